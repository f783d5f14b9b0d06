"""What a client remembers of the running session: secrets and commitments on its own disk, readable by its owner alone."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedgrove.files import write_atomically
from fedgrove.privacy.secagg.keys import Advert
from fedgrove.privacy.secagg.session import SecureError, Session
from fedgrove.privacy.secagg.sharing import SECRET_BYTES, Secret


def _new_secret() -> str:
    return secrets.token_hex(SECRET_BYTES)


@dataclass
class SessionState:
    """A client's memory of one session, filled phase by phase. Secrets and shares are in hex.

    Attributes:
        mask_seed, self_seed, channel_seed: the client's secrets; the first two are shared among its neighbors.
        adverts: the neighbors' keys, as first received.
        own_shares: the client's shares of its own secrets: {"mask": share, "self": share}.
        sealed_shares: by neighbor, the encrypted shares for it.
        held_shares: by neighbor, its shares that this client holds, like ``own_shares``.
        masked: whether this session has hidden an input.
        release: the name of the noisy release that was hidden, if it was one; see :mod:`fedgrove.privacy.release`.
        survivors: the list that this client signed.
    """

    mask_seed: str = field(default_factory=_new_secret)
    self_seed: str = field(default_factory=_new_secret)
    channel_seed: str = field(default_factory=_new_secret)
    adverts: dict[str, Advert] | None = None
    own_shares: dict[Secret, str] | None = None
    sealed_shares: dict[str, str] | None = None
    held_shares: dict[str, dict[Secret, str]] = field(default_factory=dict)
    masked: bool = False
    release: str | None = None
    survivors: list[str] | None = None

    @classmethod
    def of(cls, text: str) -> SessionState:
        """From :meth:`dumps`."""
        facts = json.loads(text)
        if facts["adverts"] is not None:
            facts["adverts"] = {peer: Advert(**advert) for peer, advert in facts["adverts"].items()}
        return cls(**facts)

    def dumps(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self))


class SessionStore:
    """Keeps the state of a client's newest session, and of no older one: what an older one hid stays hidden.

    Args:
        folder: on the client's own disk; made when it is needed.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @contextlib.contextmanager
    def opened(self, session: Session, begin: bool = False) -> Iterator[SessionState]:
        """The state of a session. Changes are on the disk when the block ends; one that raises changes nothing.

        Args:
            begin: start the session with new secrets if it is not the running one; that ends the running one.

        Raises:
            SecureError: the session is not the one that was begun last.
        """
        path = self.folder / f"{session.digest.hex()}.json"
        before = path.read_text(encoding="utf-8") if path.is_file() else None
        if before is not None:
            state = SessionState.of(before)
        elif begin:
            state = SessionState()
            for older in self.folder.glob("*.json*"):  # what a killed process was writing holds secrets too
                older.unlink()
        else:
            raise SecureError("secure aggregation: a session that this client did not begin, or that is over; refused")
        yield state
        if state.dumps() != before:
            # fsync: a response must not leave before the client cannot forget that it gave it
            write_atomically(path, state.dumps(), mode=0o600, fsync=True)
