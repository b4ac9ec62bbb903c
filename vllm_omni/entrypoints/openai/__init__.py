"""The HTTP server: OpenAI's interface to images, videos and chat, over :class:`AsyncOmni`."""
