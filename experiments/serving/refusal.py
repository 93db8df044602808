"""What is wrong with a request, in OpenAI's form."""

import contextlib

from tree_ffn.errors import InputError


class Refusal(Exception):
    """A request that is not done.

    Attributes:
      status: of HTTP.
      message: one sentence for the client.
      field: of the body, if it is one's fault.
      code: a word for programs.

    Example:
      >>> Refusal(400, "n: 0 is not allowed.", "n").body()["error"]["type"]
      'invalid_request_error'
    """

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code

    def body(self) -> dict:
        """The JSON that goes to the client."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}


@contextlib.contextmanager
def blaming(field: str):
    """What is wrong with the input inside is the fault of a field.

    Raises:
      Refusal: with the sentence of an InputError.
    """
    try:
        yield
    except InputError as error:
        raise Refusal(400, str(error), field) from None
