"""What `jobs/keys.py` takes."""

from dataclasses import dataclass
from typing import Literal

from omegaconf import MISSING

from raydistill.config.checks import at_least
from raydistill.config.serve import ServeConfig
from raydistill.errors import MissingValue

Action = Literal["create", "list", "revoke"]


@dataclass(frozen=True, kw_only=True)
class KeysConfig:
    """API keys of the server: who may ask for videos, how often, and who may see everything."""

    action: Action = MISSING
    """create prints a new key, list shows all of them without their text, revoke ends one at once."""
    name: str = ""
    """Whose key it is, for create and revoke: 1 to 64 letters, digits, '_', '.' and '-'. Jobs are kept under
    it, so no two keys ever have the same."""
    scopes: tuple[str, ...] = ("generate",)
    """What it is good for: generate (videos, and those of this key alone), admin (all of that for
    everybody's videos, /metrics, /v1/admin)."""
    per_minute: int = 0
    """Videos that it may ask for in a minute; 0 is no limit."""
    active_jobs: int = 0
    """Its videos that may wait or run at a time; 0 is no limit."""
    store: str = ServeConfig.store
    """The server's job store, as in its own settings: an SQLAlchemy URL, or "env:NAME" for one that holds a
    password. A relative path is below the folder in which Ray was started."""

    def __post_init__(self):
        """Check what can be checked without the store."""
        if self.action != "list" and not self.name:
            raise MissingValue("name", f"name=NAME, whose key to {self.action}")
        at_least("per_minute", self.per_minute, 0)
        at_least("active_jobs", self.active_jobs, 0)
