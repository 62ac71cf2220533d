// An image chat by the generated TypeScript client, as its user writes it: `chat.js URL MODEL PICTURE` prints what came back as JSON.

import { isAxiosError } from "axios";
import { ChatMessageRoleEnum, Configuration, DefaultApi, type ChatMessage, type ErrorResponse } from "./client";

async function main(url: string, model: string, picture: string): Promise<void> {
  const api = new DefaultApi(new Configuration({ basePath: url }));
  const message: ChatMessage = {
    role: ChatMessageRoleEnum.User,
    content: [
      { type: "text", text: "What is this?" },
      { type: "image_url", image_url: { url: picture } },
    ],
  };
  const { data } = await api.chatCompletionsV1({ model, messages: [message], max_tokens: 8 });
  const refusal = await api.chatCompletionsV1({ model: "no/such", messages: "x" }).catch((error) => {
    if (!isAxiosError<ErrorResponse>(error)) throw error;
    return error.response?.data.error.code;
  });
  const models = (await api.listModelsV1()).data.data.map((card) => card.id);
  const { message: answer, finish_reason: reason } = data.choices[0];
  console.log(JSON.stringify([answer.content, reason, data.usage.prompt_tokens_details.image_tokens, refusal, models]));
}

main(process.argv[2], process.argv[3], process.argv[4]);
