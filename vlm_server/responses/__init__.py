"""OpenAI's `/v1/responses`: its requests as chats, their answers as items and events, and what of both is kept."""
