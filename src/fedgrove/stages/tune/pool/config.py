"""The table ``pool`` of a stage that tunes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fedgrove import plugins
from fedgrove.job.units import Count, Fraction, Length, Name, Table, method_of
from fedgrove.stages.tune.gates import PACKAGE, Gate, gate_of, job_gate_of
from fedgrove.stages.tune.parametrizations import mixable_of, parametrization_of
from fedgrove.stages.tune.planners import planner_of

if TYPE_CHECKING:
    from fedgrove.job.tables import Job
    from fedgrove.stages.tune.config import Config

MOST_MEMBERS = 64
AUTO = "auto"
DEFAULT_MEMBERS = 4  # of a gate that does not find their number
MOST_TRIED = 8  # members that "auto" tries
Members = Annotated[int, Field(ge=1, le=MOST_MEMBERS)]
MOST_STARTS = 64
Starts = Annotated[int, Field(ge=1, le=MOST_STARTS)]
Blocks = Annotated[tuple[Fraction, ...], Field(min_length=1, max_length=16)]
Size = Annotated[int, Field(ge=1, le=128)]
FitRounds = Annotated[int, Field(ge=1, le=1000)]


class Pool(Table):
    """``pool = { gate = "similar" }``: several adapters in a stage "tune", and a gate that gives texts to them.

    Attributes:
        gate: what decides which member a text gets: "similar", the direction of all windows of an owner together; "keys",
            directions of single windows' features; "mixture", Gaussians of them; "user_centric", every owner has a member, into
            which the changes of owners who are alike go; "groups", what the job says of the owners; "losses", the member of the
            lowest loss; "random", the seed.
        members: number of adapters. With ``groups`` it is their number, with "user_centric" that of the clients. "auto", only
            with gates that look at features: as many as there are kinds of text, at most eight. With "similar", as many kinds
            of owners as one half of their text tells of the other half; with the others, one more than there are directions
            that tell owners apart. Where "auto" cannot be, the default is 4.
        common: the fraction of the rounds in which everybody first trains one adapter, from which the members then begin. Not
            gate "user_centric".
        groups: which clients belong together, by the group's name. Only gate "groups".
        blocks: how deep in the model the features are taken, as fractions of its blocks: 0 are the embeddings. Only gates that
            look at features, as all that follow.
        directions: which features: "owners", those that tell the owners' windows apart. Where these are fewer than tell so many
            members apart, as with "windows": the principal ones of all windows, which do not depend on who has which. Not
            gate "similar".
        size: number of features, at most.
        prefix: tokens of a window that the gate looks at, from its beginning; at most all.
        starts: how many fits are made side by side; the best one is kept.
        fit_rounds: the most exchanges of a fit.
        windows: how many of its windows a client measures all members on, before every round. Only gate "losses".
    """

    gate: Annotated[str, method_of("stages.tune.gates")] = "similar"
    members: Members | Literal["auto"] = "auto"
    common: Fraction = 0.3
    groups: Annotated[dict[Name, tuple[Name, ...]], Field(max_length=MOST_MEMBERS, default_factory=dict)]
    blocks: Blocks = (0.25, 0.5, 0.75)
    directions: Literal["owners", "windows"] = "owners"
    size: Size = 16
    prefix: Length = 64
    starts: Starts = 8
    fit_rounds: FitRounds = 40
    windows: Count = 8

    @model_validator(mode="before")
    @classmethod
    def _default_members(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "members" in value:
            return value
        groups, gate = value.get("groups"), value.get("gate", cls.model_fields["gate"].default)
        if isinstance(groups, dict) and groups:
            return {**value, "members": len(groups)}
        chooses = gate in plugins.names(PACKAGE) and gate_of(gate).CHOOSES and value.get("directions") != "windows"
        return value if chooses else {**value, "members": DEFAULT_MEMBERS}

    @model_validator(mode="after")
    def _uses_its_keys(self) -> Self:
        special = {"common", "groups", "blocks", "directions", "size", "prefix", "starts", "fit_rounds", "windows"}
        for key in sorted(special - self.method.KEYS):
            if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                raise ValueError(f'{key}: gate "{self.gate}" does not use it; leave it out')
        return self

    @model_validator(mode="after")
    def _finds_their_number(self) -> Self:
        if self.members != AUTO:
            if self.method.LOOKS == "changes":
                raise ValueError(f'members: gate "{self.gate}" has one for each client; leave members out')
            return self
        if not self.method.CHOOSES:
            raise ValueError(f'members: gate "{self.gate}" does not find their number; give one')
        if self.directions == "windows":
            raise ValueError('members: directions = "windows" do not tell how many there are; give a number')
        if self.method.LOOKS == "features" and self.side_by_side > MOST_STARTS:
            raise ValueError(f"starts: {MOST_STARTS // MOST_TRIED} at most for each number of members that is tried; lower it")
        return self

    @property
    def most(self) -> int:
        """The largest number of members."""
        if self.method.LOOKS == "changes":
            return MOST_MEMBERS
        return self.members if isinstance(self.members, int) else MOST_TRIED

    @property
    def side_by_side(self) -> int:
        """How many fits are made at once."""
        return self.starts * (self.most if self.members == AUTO and self.method.OF_CLIENTS else 1)

    @property
    def method(self) -> Gate:
        """The module of the gate."""
        return gate_of(self.gate)

    def deals_in_sums(self, precision: str) -> bool:
        """See :attr:`fedgrove.stages.tune.config.Config.deals_in_sums`."""
        return self.method.LOOKS == "features" and self.most > 1 and precision == "fixed"

    def common_rounds(self, rounds: int) -> int:
        """How many of a stage's rounds all train one adapter."""
        return 0 if self.method.LOOKS == "changes" else round(self.common * rounds)


def check_stage(config: Config) -> None:
    """Refuses keys of the stage with which a pool cannot be trained.

    Raises:
        ValueError: begins with ``pool`` and gives the remedy.
    """
    pool = config.pool
    assert pool is not None
    what = parametrization_of(config.parametrization)
    if not what.FROZEN or what.FORM == "coefficients":
        raise ValueError('pool: every member would be a whole model; set method = "lora" or "ia3"')
    if mixable_of(config.parametrization).IN_COMMON and not config.aggregation_method.SHARED_A:
        raise ValueError('pool: a mixture of members is one adapter only if all share A; set aggregation = "ffa_lora"')
    if not planner_of(config.planner).EQUAL_RANKS:
        raise ValueError(f'pool: planner "{config.planner}" plans for one adapter; set method = "lora"')
    for key in ("personal", "personal_experts"):
        if getattr(config, key):
            raise ValueError(f"pool: it has no {key} yet; leave one of them out")
    sees_text = pool.method.LOOKS in ("features", "members")
    if config.epsilon is not None and sees_text and not (pool.method.OF_CLIENTS and config.noisy_gate):
        raise ValueError(
            f'epsilon: gate "{pool.gate}" of the pool looks at single windows or at losses, which get no noise; set gate = '
            '"similar" or "groups"'
        )
    if pool.method.LOOKS == "changes" and (config.server_optimizer != "average" or config.server_lr is not None):
        raise ValueError(
            f'server_optimizer: gate "{pool.gate}" of the pool itself makes members of what clients change; leave '
            "server_optimizer and server_lr out"
        )
    if config.epsilon is not None and config.dp_unit == "client":
        raise ValueError('epsilon: in a pool it protects windows, not clients; set dp_unit = "window"')


def check_clients(config: Config, job: Job, index: int) -> None:
    """Refuses a pool whose members the job's clients cannot train.

    Raises:
        ValueError: begins with the key, such as ``stages.0.pool.groups``, and gives the remedy.
    """
    pool, clients = config.pool, [client.name for client in job.clients]
    assert pool is not None
    at = f"stages.{index}.pool"
    dealt: dict[str, int] = {}
    if pool.method.LOOKS == "job":
        try:
            dealt = job_gate_of(pool.gate).deal(pool, clients, str(job.seed))
        except ValueError as error:
            raise ValueError(f"{at}.{error}") from error
    if pool.method.OF_CLIENTS and isinstance(pool.members, int) and pool.members > len(clients):
        raise ValueError(
            f'{at}.members: gate "{pool.gate}" gives each client one of {pool.members}, but there are {len(clients)} clients; '
            "lower it"
        )
    if pool.method.LOOKS == "changes" and len(clients) > pool.most:
        raise ValueError(
            f'{at}.gate: "{pool.gate}" has a member for each of {len(clients)} clients, and a pool {pool.most} at most; use '
            'gate = "similar"'
        )
    if not job.privacy.secure_aggregation or pool.method.LOOKS == "features":
        return
    if pool.method.LOOKS == "changes":
        raise ValueError(
            f'privacy.secure_aggregation: {at}.gate: "{pool.gate}" weighs what each client has changed, and a sum hides that; '
            'use gate = "similar"'
        )
    if pool.method.LOOKS == "members":
        raise ValueError(
            f'privacy.secure_aggregation: {at}.gate: "{pool.gate}" has the server know which members a client trains; '
            'use gate = "keys"'
        )
    for member in range(pool.most):
        number = sum(one == member for one in dealt.values())
        if number < job.together(number):
            raise ValueError(
                f"privacy.min_group: member {member} of {at} would be trained by {number} clients, but {job.together(number)} "
                "are needed to hide one of them in a sum; make groups larger"
            )
