"""The HTTP server: OpenAI's and LMDeploy's routes in front of one engine process."""

__version__ = "0.1.0"
