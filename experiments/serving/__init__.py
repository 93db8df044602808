"""The server of experiments/serve.py: OpenAI's form of text completion over HTTP."""
