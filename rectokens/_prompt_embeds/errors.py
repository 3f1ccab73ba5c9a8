"""Errors of the prompt-embeds wire format."""


class PromptEmbedsError(ValueError):
    """The caller's prompt embeddings cannot be accepted; the message says why."""


class PromptEmbedsTooLargeError(PromptEmbedsError):
    """A limit on size was passed: bytes, tokens or payloads."""
