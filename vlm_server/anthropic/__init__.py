"""Anthropic's Messages API: its requests as chats of ours, and the answers in its shape."""
