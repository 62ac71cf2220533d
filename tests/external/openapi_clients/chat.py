"""An image chat by the generated Python client, as its user writes it: `chat.py URL MODEL PICTURE` prints what came back as JSON."""

import json
import sys

import openapi_client
from openapi_client import (
    ChatCompletionRequest,
    ChatMessage,
    Content,
    ContentPart,
    ImagePart,
    ImagePartImageUrl,
    ImageUrl,
    Messages,
    TextPart,
)


def main(url: str, model: str, picture: str) -> None:
    text = TextPart(type="text", text="What is this?")
    image = ImagePart(type="image_url", image_url=ImagePartImageUrl(ImageUrl(url=picture)))
    message = ChatMessage(role="user", content=Content([ContentPart(text), ContentPart(image)]))
    with openapi_client.ApiClient(openapi_client.Configuration(host=url)) as client:
        api = openapi_client.DefaultApi(client)
        answer = api.chat_completions_v1(ChatCompletionRequest(model=model, messages=Messages([message]), max_tokens=8))
        try:
            api.chat_completions_v1(ChatCompletionRequest(model="no/such", messages=Messages("x")))
        except openapi_client.exceptions.NotFoundException as error:
            refusal = error.data.error.code
        models = [card.id for card in api.list_models_v1().data]
    image_tokens = answer.usage.prompt_tokens_details.image_tokens
    print(json.dumps([answer.choices[0].message.content, answer.choices[0].finish_reason, image_tokens, refusal, models]))


main(*sys.argv[1:])
