"""Requests that work when pressed in the Swagger page, picture included; also what the README shows."""

from typing import Any

# A red circle on white, 224 × 224, PNG.
RED_CIRCLE = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAOAAAADgBAMAAADoA3fSAAAAGFBMVEX//////f374eHpbGzdHh7cFhbcFBTaCQnWAHJXAAAFNElEQVR42u2bTU"
    "9bRxSGz7FRbafBM+NUWbRQwI4qVYlALmXRLrIoWfQHZNN9/2XloC4adQGtWNA0avCHiDCQ4plxVLiXAtNFU9KmeD7OvddppXlXYIMfv2fOmY87"
    "MwBRUVFRUVFRUVFRUVFRUVFRUVFRUVFvRUj7NwEAclrAv2A0KIbjJAA0DPDe1W8FApFLaAj+yp2RPRBGFQgURjWWxCqAUQACYEvKLnJZGFDIUv"
    "tW2/SuXmjwi43jfpBJDOI1muuXfRBXr0jApV9//AGZKgIoZOvOSg/5P140qjH7qKv9ieUQ3oP6gai+8YVr5mgVRhpyBwrZeniixTUxqgzvwqiW"
    "5AzE09bDbq167Vu14V3zhCe5ApF98GBfTHq3Nrx32vMkegL5eK1em/x2bbh6MsjTIZ6tfWTN59pBex+9LJb8Atq878hDtrcueW4O+cuv+45Pw0"
    "rZ9PMCYrp2KZx/JNv7kOQD5HNfenRItaPKz/k4xLNPk6rHR1XeO0+SPJKGNZe90gFH6zoPh74GAaq/e1gs5WYQAKWHxXJ+BgEqHhZL+RkEQPmF"
    "zuoQb9zzNghQOTt21aLTofY3CIDjJmZ0yJfB3yBAZXEjGxDPvgqa1+GLGUfaOELKm4ET67orbRxAc2sQSCxxniGkoREFwKNzldAd8qaCnGNack"
    "RUhwJdMS3Zy2qFh/JwbyGDQ2Th61XTQDKQ3RmEA1lbZUgayipeL3IiEMf3CUR8yehJQ3pOYW9EG5C1NAVob0SrQ6FIFoHYhqhJOQP4nHFi0izz"
    "qTqkPhYDIzQJyJaITcjaRIdlTbRILQtiCwIgKWmoSQqAe5Y0tZXFh2SLtLJAMi/zGj9YlrqwAAWZx5YoDhlXVKChtSG5DK2FWCqgDN9C0kwdiJ"
    "PnpsUAFZt2SFU4EDN0NFii9KXa0A2SBmADsSwi8D8ONJw+WJjZqZeFmnJI+eQBcaYQoFHm/5ClatrAC0YPKc0hfW1hCc7kpNH05lUvptzTIG2K"
    "kaHyaW0I2+Q8VaSurU7tTM08KWmydDSW+ZAtpJIX8GUsDnWZ0YKqd4kDMDVncGTpo8q2Nde7QbsyV0p3LZsltjokpqmZ19Q5DTGmRikaUB8vkJ"
    "qwR561jWhJ2rWNa2XrsnKGkjXVHdsGm82h8Tvs8K854kBRQ4qURkR7B2XtSxXlEa1+ah3X7Nt57LdqaCOad55Y90gde08yfCJV7yv6YkbtBg8Y"
    "4w37d3TskLLQwjCVnSTDDqkxvdCY1gcqy/pQh8Z03HF8Q9fBgcA8Nbc3INM+PuBuUO3rS6WyOUyTkFHYnG0mGQ9/mPogZEI855zLuk+bPAvYER"
    "p3nDnmBJrZb70rw8xtm8xA0Jve+5bjjvvBvBvob1F6GPRZrvlaNCUPgz5AM7vhVYvax6DX2cR0eNOjFs3736QqHyCw5LNDF9GMf/n+FHICpqOL"
    "ldQV0PnHPqc9PY/siu5NU7Nn6ELnaX5HdkHWN5vWKwCm8Wjbr3g8T0GnJ4efD2uWinj22HMzzvdguRimn0wkmtL5Fnp2R77AhPeTSUR547wzOI"
    "V8gZCwfrI6TKvXLM6az78bsLzP6gOkrH+6atSbJmXa3NwZFHH9AVLWOyh/PEz+jpRJ43bnp8NiLngActlorsNIvb6C1OCbMuhCSeglHYlN0VoE"
    "KQFACDBbsqvC7gUFro+EUbgkkLc4wJZRcqQCLwUFn5lBbhTgIgIAjNSfvxYKBEAOryCvfyoUCFenNMJpUVFRUVFRUVFRUVFRUVFRUVFRUVFRb0"
    "9/AJ9evZBWPDcSAAAAAElFTkSuQmCC"
)


_PICTURE_CHAT = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "Describe the image please"}, {"type": "image_url", "image_url": {"url": RED_CIRCLE}}],
    }
]

_PICTURE_MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Describe the image please"},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": RED_CIRCLE.partition(",")[2]}},
        ],
    }
]

_WEATHER_CHAT = [{"role": "user", "content": "How is the weather in Hangzhou?"}]
_FUNCTION: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
_TOOLS = [{"type": "function", "function": _FUNCTION}]


_SEEN = {
    "name": "seen",
    "schema": {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green", "blue"]}, "shape": {"enum": ["circle", "square", "star"]}},
        "required": ["colour", "shape"],
        "additionalProperties": False,
    },
}


def request_examples(model: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Path → name → OpenAPI example of the request's body."""
    return {
        "/v1/chat/completions": _chat(model),
        "/v1/completions": _completions(model),
        "/v1/messages": _messages(model),
        "/v1/messages/count_tokens": {"image": _example("A picture", {"model": model, "messages": _PICTURE_MESSAGES})},
        "/generate": _generate(),
        "/v1/embeddings": _embeddings(),
        "/v1/responses": _responses(),
        "/v1/chat/interactive": _interactive(),
        "/tokenize": _tokenize(),
        "/detokenize": {"tokens": _example("Token ids", {"tokens": [33, 34, 35]})},
        "/abort_request": {"all": _example("All requests of this API key", {"abort_all": True})},
        "/get_ppl": {"text": _example("A text", {"input": "The sun rises in the east."})},
        "/v1/encode": {"text": _example("A text", {"input": "two steps to build a house:"})},
    }


def alpaca_examples() -> dict[str, dict[str, dict[str, Any]]]:
    """The same of a server with `--compat alpaca`."""
    story = {"role": "user", "message": "Tell me some stories about Hangzhou"}
    turns = [story, {"role": "assistant", "message": "Gladly. What interests you most?"}, {"role": "user", "message": "The West Lake"}]
    prompt = {"prompt": "Tell me where the capital of China is"}
    return request_examples("") | {
        "/v1/chat/completions": {
            "chat": _example("A question", {"messages": [story], "repetition_penalty": 1.0}),
            "turns": _example("Several turns, streamed", {"messages": turns, "stream": True}),
        },
        "/v1/completions": {
            "instruction": _example("An instruction", prompt),
            "beams": _example("With beams", {**prompt, "max_tokens": 90, "temperature": 0.7, "num_beams": 4, "top_k": 40}),
        },
        "/v1/embeddings": {"text": _example("A text", {"input": "The weather is really nice today"})},
    }


def _chat(model: str) -> dict[str, dict[str, Any]]:
    text = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Say this is a test!"}]
    image = {"model": model, "messages": _PICTURE_CHAT, "max_tokens": 64}
    return {
        "text": _example("Text", {"model": model, "messages": text, "max_tokens": 64}),
        "image": _example("A picture as a data: URL", image),
        "tools": _example("A function that may be called", {"model": model, "messages": _WEATHER_CHAT, "tools": _TOOLS, "max_tokens": 64}),
        "json": _example("An answer in JSON", {**image, "response_format": {"type": "json_schema", "json_schema": _SEEN}}),
        "stream": _example("Streamed, with the usage at the end", {**image, "stream": True, "stream_options": {"include_usage": True}}),
    }


def _responses() -> dict[str, dict[str, Any]]:
    picture = [{"type": "input_text", "text": "Describe the image please"}, {"type": "input_image", "image_url": RED_CIRCLE}]
    image = {"input": [{"role": "user", "content": picture}], "max_output_tokens": 64}
    schema = {"format": {"type": "json_schema", **_SEEN}}
    function: Any = _TOOLS[0]["function"]
    call = {"input": _WEATHER_CHAT, "tools": [{"type": "function", **function}], "max_output_tokens": 64}
    return {
        "text": _example("Text", {"instructions": "You are a helpful assistant.", "input": "Say this is a test!", "max_output_tokens": 64}),
        "image": _example("A picture as a data: URL", image),
        "tools": _example("A function that may be called", call),
        "json": _example("An answer in JSON", {**image, "text": schema}),
        "stream": _example("Streamed, and not kept", {**image, "stream": True, "store": False}),
    }


def _messages(model: str) -> dict[str, dict[str, Any]]:
    image = {"model": model, "messages": _PICTURE_MESSAGES, "max_tokens": 64}
    tool = {"name": _FUNCTION["name"], "description": _FUNCTION["description"], "input_schema": _FUNCTION["parameters"]}
    return {
        "image": _example("A picture in base64", image),
        "tools": _example("A tool that may be used", {"model": model, "messages": _WEATHER_CHAT, "tools": [tool], "max_tokens": 64}),
        "stream": _example("Streamed", {**image, "stream": True}),
    }


def _interactive() -> dict[str, dict[str, Any]]:
    turn = {"prompt": "Hello! How are you?", "session_id": 1, "interactive_mode": True, "request_output_len": 64}
    return {
        "turn": _example("A turn that the server keeps", turn),
        "image": _example("A turn with a picture, streamed", {**turn, "prompt": "Describe it", "image_url": RED_CIRCLE, "stream": True}),
        "end": _example("The end of the session", {"prompt": "", "session_id": 1, "interactive_mode": False, "request_output_len": 0}),
    }


def _completions(model: str) -> dict[str, dict[str, Any]]:
    prompt = "two steps to build a house:"
    return {
        "string": _example("One prompt", {"model": model, "prompt": prompt, "max_tokens": 32}),
        "echo": _example(
            "The prompt's log probabilities", {"model": model, "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0}
        ),
        "list": _example("Several prompts", {"model": model, "prompt": [prompt, "The capital of China is"], "max_tokens": 16}),
    }


def _generate() -> dict[str, dict[str, Any]]:
    return {
        "prompt": _example(
            "A text, with log probabilities", {"prompt": "The capital of China is", "max_tokens": 16, "return_logprob": True}
        ),
        "image": _example("A picture before a text", {"prompt": "A picture of", "image_data": RED_CIRCLE, "max_tokens": 16}),
    }


def _embeddings() -> dict[str, dict[str, Any]]:
    return {
        "text": _example("A text", {"input": "The weather is really nice today"}),
        "image": _example("A picture and a text as one vector", {"input": _PICTURE_CHAT[0]["content"]}),
    }


def _tokenize() -> dict[str, dict[str, Any]]:
    return {
        "prompt": _example("A prompt", {"prompt": "two steps to build a house:", "return_token_strs": True}),
        "image": _example("A chat with a picture", {"messages": _PICTURE_CHAT}),
        "tools": _example("A chat with a function", {"messages": _WEATHER_CHAT, "tools": _TOOLS}),
    }


def _example(summary: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"summary": summary, "value": value}
