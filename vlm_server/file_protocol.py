"""The requests of `/v1/files`: OpenAI's form and query, for pictures alone. Checks shape only."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from vlm_server.message_schema import UnicodeText

MAX_LISTED = 10_000  # OpenAI's

Filename = Annotated[UnicodeText, Field(min_length=1, max_length=255)]


class ExpiresAfter(BaseModel):
    model_config = ConfigDict(extra="allow")

    anchor: Literal["created_at"]
    seconds: int = Field(ge=1, description="At most --max-file-ttl.")


class FileForm(BaseModel):
    """A form's fields; of the file its name."""

    model_config = ConfigDict(extra="allow")

    file: Filename
    purpose: Literal["vision", "user_data", "assistants"]
    expires_after: ExpiresAfter | None = None


class FileListQuery(BaseModel):
    model_config = ConfigDict(extra="allow")

    limit: int = Field(MAX_LISTED, ge=1, le=MAX_LISTED, description="Files of one page.")
    order: Literal["asc", "desc"] = Field("desc", description="By the time of their upload.")
    after: str | None = Field(None, description="The id of the last file of the page before.")
    purpose: str | None = Field(None, description="Only files that were uploaded for it.")


# A form is not read as JSON is, so it is described by hand.
FORM_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "format": "binary", "description": "A picture; its form is seen by its bytes."},
                    "purpose": {
                        "type": "string",
                        "enum": ["vision", "user_data", "assistants"],
                        "description": "Shown again, and to be searched for; has no other effect.",
                    },
                    "expires_after[anchor]": {"type": "string", "enum": ["created_at"], "description": "Needed beside the seconds."},
                    "expires_after[seconds]": {
                        "type": "integer",
                        "minimum": 1,
                        "description": "When the file ends; default: --file-ttl, at most --max-file-ttl.",
                    },
                },
            }
        }
    },
}
