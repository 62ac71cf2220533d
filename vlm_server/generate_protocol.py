"""The requests of LMDeploy's `/generate` and `/abort_request`. Checks shape and bounds only."""

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from vlm_server.aborting import NO_SESSION


class AbortRequest(BaseModel):
    """Which requests are to end. A null field is as good as an absent one."""

    model_config = ConfigDict(extra="allow")

    abort_all: bool = Field(False, description="All requests of this API key.")
    session_id: int = Field(NO_SESSION, ge=-(2**63), lt=2**63, description="Those that were sent with this number.")

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_absent(cls, value: object, info: ValidationInfo) -> object:
        assert info.field_name
        return cls.model_fields[info.field_name].default if value is None else value
