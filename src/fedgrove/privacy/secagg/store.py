"""A client's state of the current session: secrets and decisions, in files that only the file's owner can read."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedgrove.files import write_atomically
from fedgrove.privacy.secagg.keys import Advert
from fedgrove.privacy.secagg.session import OtherSurvivors, SecureError, Session
from fedgrove.privacy.secagg.sharing import SECRET_BYTES, Secret

ENDED = "records/ended.txt"  # the digests of the sessions that were begun and are over, one in a line
SUMS = "records/sums.json"  # by name of the sum, the clients in it


def _new_secret() -> str:
    return secrets.token_hex(SECRET_BYTES)


@dataclass
class SessionState:
    """A client's state of one session, filled phase by phase. Secrets and shares are in hex.

    Attributes:
        mask_seed, self_seed, channel_seed: the client's secrets; the first two are shared among its neighbors.
        adverts: the neighbors' keys that are valid, as first received.
        adverts_digest: of the keys of all clients, in hex; empty before they are received.
        own_shares: the client's shares of its own secrets: {"mask": share, "self": share}.
        sealed_shares: by neighbor, the encrypted shares that this client sends to it.
        held_shares: by neighbor, the shares of the neighbor's secrets that this client holds, like ``own_shares``.
        received: by neighbor, the encrypted shares as first received; None: phase 3 has not begun.
        peers: the neighbors with which the input shares a mask; None: no input was masked.
        sum_name: the name of the sum of that input in its run.
        survivors: the list that this client signed.
    """

    mask_seed: str = field(default_factory=_new_secret)
    self_seed: str = field(default_factory=_new_secret)
    channel_seed: str = field(default_factory=_new_secret)
    adverts: dict[str, Advert] | None = None
    adverts_digest: str = ""
    own_shares: dict[Secret, str] | None = None
    sealed_shares: dict[str, str] | None = None
    held_shares: dict[str, dict[Secret, str]] = field(default_factory=dict)
    received: dict[str, str] | None = None
    peers: list[str] | None = None
    sum_name: str = ""
    survivors: list[str] | None = None

    @classmethod
    def of(cls, text: str) -> SessionState:
        """Reads what :meth:`dumps` wrote."""
        facts = json.loads(text)
        if facts["adverts"] is not None:
            facts["adverts"] = {peer: Advert(**advert) for peer, advert in facts["adverts"].items()}
        return cls(**facts)

    def dumps(self) -> str:
        """The state as JSON."""
        return json.dumps(vars(self), default=vars)  # asdict would copy all shares first


class SessionStore:
    """Stores the state of a client's newest session only: without its state, an older one can no longer be unmasked.

    It also records the sessions that are over, so that none is begun again with other secrets, and the clients in each
    sum, so that no second sum differs from it in one of them. Before anything is sent, what it depends on is on the disk
    and would survive a power failure.

    Args:
        folder: on the client's own disk; created when needed. It may be removed after the run.
        records: the folder in which it records the clients of each sum; default: in ``folder``. A site keeps it for all
            runs of a job.
    """

    def __init__(self, folder: Path, records: Path | None = None):
        self.folder = folder
        self._ended_file, self._sums_file = folder / ENDED, (records or folder) / SUMS

    @contextlib.contextmanager
    def opened(self, session: Session, begin: bool = False) -> Iterator[SessionState]:
        """The state of a session. Changes are written when the block ends, unless it raises.

        Args:
            begin: if the session is not the current one, start it with new secrets; this ends the current one.

        Raises:
            SecureError: the session is not the one that was started last, and ``begin`` is false; or it was begun before
                and has ended.
        """
        path = self.folder / f"{session.digest.hex()}.json"
        before = path.read_text(encoding="utf-8") if path.is_file() else None
        if before is not None:
            state = SessionState.of(before)
        elif begin:
            state = SessionState()
            if session.digest.hex() in self._ended():
                raise SecureError("secure aggregation: this client began this session before, and it is over; refused")
            self.end_all()
        else:
            raise SecureError("secure aggregation: this client did not begin this session, or it is over; refused")
        yield state
        after = state.dumps()
        if after != before:
            # fsync: before a response is sent, its record must survive a power failure
            write_atomically(path, after, mode=0o600, fsync=True)

    def agree_on_survivors(self, sum_name: str, client: str, survivors: list[str]) -> None:
        """Records with which clients this client's input is summed; called before it signs their list.

        Args:
            sum_name: the name of the sum in the run; also in a later session, and after the run was continued.
            client: this client's name.
            survivors: the names of the clients in the sum, sorted.

        Raises:
            OtherSurvivors: the sum was one of other clients before.
        """
        file = self._sums_file
        sums: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        known = sums.setdefault(sum_name, survivors)
        if known != survivors:
            raise OtherSurvivors(
                f"its response is already in a sum of other clients ({', '.join(known)})",
                "continue with --resume when all of them are back, or run the job under another name",
                client=client,
            )
        write_atomically(file, json.dumps(sums), mode=0o600, fsync=True)

    def end_all(self) -> int:
        """Ends the current session and removes its secrets; returns how many files were removed."""
        digests = [file.stem for file in sorted(self.folder.glob("*.json"))]
        if digests:
            text = "".join(f"{digest}\n" for digest in [*self._ended(), *digests])
            write_atomically(self._ended_file, text, mode=0o600, fsync=True)
        files = list(self.folder.glob("*.json*"))  # also partial files of a killed process, which contain secrets
        for file in files:
            file.unlink()
        return len(files)

    def _ended(self) -> list[str]:
        file = self._ended_file
        return file.read_text(encoding="utf-8").split() if file.is_file() else []
