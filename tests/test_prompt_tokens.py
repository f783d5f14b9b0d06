"""Method ``tokens`` of the stage ``prompt``: clients edit words and vote for them, the server merges sums of votes."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedgrove.client.local_client import LocalClient
from fedgrove.data.tokens import encode
from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.rounds.request import Reply
from fedgrove.rounds.wire import WireError
from fedgrove.stages.prompt.candidates import as_ids
from fedgrove.stages.prompt.editing import Arm, Budget, Lexicon, choose, edit, likeness, propose
from fedgrove.stages.prompt.exchanges.votes import CALLS, PLACES, VOTES, VoteForWords
from fedgrove.stages.prompt.lexicon import lexicon_of
from fedgrove.stages.prompt.merging import NOISE, attention, dbscan, elbow, merge_votes
from fedgrove.stages.prompt.methods import Task, tokens
from small import CLIENTS, Moment, Small, cli, complaint, killed, lines, measurements
from test_prompt import LABELS, WORDS, _write, job, same

PUBLIC = ["wing", "feather", "nest", "sea", "water", "scale", "leaf", "root", "bark", "the", "of", "and", "what", "kind"]
CANARY = "zebra quartz"  # words of one client's text alone


@pytest.fixture(scope="module")
def files(small: Small) -> dict[str, Path]:
    """Records of every client, of which ash's contain the canary; a test; and a public list of words."""
    found = {}
    for offset, client in enumerate((*CLIENTS, "test")):
        rows = []
        for number in range(3 + offset):
            label = LABELS[(number + offset) % 3]
            secret = f" {CANARY}" if client == "ash" else ""
            rows.append({"text": f"{WORDS[label]}{secret} {number}", "label": label.strip()})
        found[client] = _write(small.folder / f"edited-{client}.jsonl", rows)
    found["words"] = small.folder / "public-words.txt"
    found["words"].write_text("\n".join(PUBLIC) + "\n")
    return found


def voting(files: Mapping[str, Path], owners: tuple[str, ...] = CLIENTS, **changes: Any) -> dict[str, Any]:
    stage = {
        "method": "tokens", "tokens": 4, "words": str(files["words"]), "population": 5, "generations": 1, "rounds": 2,
        "dimension": None, "spread": None, "evaluate__data": [],
    }  # fmt: skip
    return job(files, owners, **{**stage, **changes})


# The server: from votes to a prompt


def from_lists(prompts: Sequence[Sequence[int]], embeddings: Tensor, most: int) -> list[int]:
    """The merged prompt from every client's list, vote by vote, in plain Python."""
    votes = [(word, place) for prompt in prompts for place, word in enumerate(prompt)]
    rows = [[float(x) for x in row] for row in embeddings]

    def cos(a: int, b: int) -> float:
        dot = math.fsum(x * y for x, y in zip(rows[a], rows[b], strict=True))
        return dot / math.sqrt(math.fsum(x * x for x in rows[a]) * math.fsum(y * y for y in rows[b]))

    weight = {}
    for i, (word, _) in enumerate(votes):
        weight[word] = math.fsum(cos(word, other) for j, (other, _) in enumerate(votes) if j != i)
    distinct = sorted(weight)
    near = 0.0
    if len(distinct) > 2:
        nearest = sorted(min(1 - cos(a, b) for b in distinct if b != a) for a in distinct)
        bends = [nearest[i + 1] - 2 * nearest[i] + nearest[i - 1] for i in range(1, len(nearest) - 1)]
        near = nearest[1 + bends.index(max(bends))]
    groups = {word: {word} for word in distinct}  # with two points to a cluster, clusters are what hangs together
    for a in distinct:
        for b in distinct:
            if a < b and 1 - cos(a, b) <= near + 1e-12 and groups[a] is not groups[b]:
                groups[a] |= groups[b]
                for word in groups[b]:
                    groups[word] = groups[a]
    number = Counter(word for word, _ in votes)
    alone = {word for word in distinct if len(groups[word]) == 1 and number[word] < 2}
    best = {max(groups[word], key=lambda one: weight[one]) for word in distinct if word not in alone}
    taken = sorted(best, key=lambda word: -weight[word])[:most]
    mean = {word: sum(place for one, place in votes if one == word) / number[word] for word in taken}
    return sorted(taken, key=lambda word: (mean[word], word))


def test_the_sums_of_votes_give_the_prompt_that_the_lists_give() -> None:
    """On a hundred random federations; with clusters and noise, and more words than there is room for."""
    lengths = Counter()
    for seed in range(100):
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        words, width = 14, 6
        embeddings = torch.randn(words, width, generator=generator) + draw.choice([0.0, 0.5])
        embeddings[7:] = embeddings[:7] + draw.choice([0.05, 0.4, 2.0]) * torch.randn(7, width, generator=generator)
        prompts = [draw.sample(range(words), draw.randint(1, 5)) for _ in range(draw.randint(1, 6))]
        votes, places = torch.zeros(words, dtype=torch.int64), torch.zeros(words, dtype=torch.int64)
        for prompt in prompts:
            votes[prompt] += 1
            places[prompt] += torch.arange(len(prompt))
        found = merge_votes(votes, places, embeddings, 5)
        assert found == from_lists(prompts, embeddings, 5), seed
        lengths[len(found)] += 1
    assert len(lengths) > 4, "prompts of many lengths"


def test_a_words_weight_is_its_likeness_to_all_other_votes() -> None:
    similar = torch.tensor([[1.0, 0.5, -0.25], [0.5, 1.0, 0.0], [-0.25, 0.0, 1.0]]).double()
    assert attention(torch.tensor([2.0, 1.0, 3.0]).double(), similar).tolist() == [1 + 0.5 - 0.75, 1.0, 2 - 0.5]


def test_density_finds_known_clusters() -> None:
    def clusters(points: Sequence[Sequence[float]], near: float, least: int) -> list[int]:
        table = torch.tensor(points).double()
        return dbscan((table[:, None] - table[None]).norm(dim=2), near, least)

    # the example of scikit-learn's documentation
    assert clusters([[1, 2], [2, 2], [2, 3], [8, 7], [8, 8], [25, 80]], 3, 2) == [0, 0, 0, 1, 1, NOISE]
    # 4 is near both clusters and no core point: it is in the first one, and does not connect them
    assert clusters([[0], [1], [2], [4], [6], [7], [8]], 2, 4) == [0, 0, 0, 0, 1, 1, 1]
    assert clusters([[0], [1], [2], [3]], 1, 3) == [0] * 4, "the ends are near core points"
    assert clusters([[0], [1]], 1, 3) == [NOISE] * 2
    assert clusters([[5]], 1, 1) == [0]


def test_points_are_near_up_to_where_the_distances_bend() -> None:
    table = torch.tensor([0.0, 1.0, 2.0, 10.0, 12.0, 50.0]).double()  # to the nearest: 1, 1, 1, 2, 2, 38
    assert elbow((table[:, None] - table[None]).abs()) == 2.0
    assert elbow(torch.zeros(2, 2).double()) == 0.0


def test_a_word_that_is_like_no_other_needs_two_votes() -> None:
    embeddings = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.9, 0.0, 0.0, 0.1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    places = torch.tensor([0, 2, 6, 1, 0])
    assert merge_votes(torch.tensor([2, 1, 2, 1, 0]), places, embeddings, 5) == [0, 2]
    assert merge_votes(torch.tensor([1, 2, 2, 1, 0]), places, embeddings, 5) == [1, 2], "by weight"
    assert merge_votes(torch.zeros(5, dtype=torch.int64), places, embeddings, 5) == []


def test_what_costs_least_stays_and_who_voted_is_known() -> None:
    """Of equal ones the old prompt; a word of one client is named as long as no other has voted for it."""
    task = Task("0/0", 1, 3, start=(7, 8), words=tuple((i,) for i in range(6)))
    state = tokens.begin(task)
    assert (state.words, state.prompt) == (((7,), (8,), (0,), (1,), (2,), (3,)), (0, 1))
    # words 2 and 3 say the same, and so do 1 and 4; 0 was voted for twice
    embeddings = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0.1, 1], [0, 1, 0.1], [1, 1, 1]])
    merged = tokens.merge(state, torch.tensor([2, 1, 1, 1, 0, 0]), torch.tensor([0, 2, 1, 1, 0, 0]), embeddings)
    word = merged.offers[1][1]
    assert tokens.propose(merged, 0).tolist()[0][:2] == [7, 8]
    assert merged.offers[0] == (0, 1)
    assert tokens.tell(merged, 0, tokens.propose(merged, 0), [0.5] * len(merged.offers)).prompt == (0, 1)
    better = tokens.tell(merged, 0, tokens.propose(merged, 0), [0.5, 0.25, *[0.3] * (len(merged.offers) - 2)])
    assert better.prompt == merged.offers[1]
    assert tokens.finalists(better).tolist() == [[7, 8], [7, *state.words[word]]]
    assert tokens.words_of_one(better, 0) == []
    assert tokens.words_of_one(better, 1) == [state.words[word]]


# The client: what to try next


def test_what_is_unlike_what_was_tried_is_tried_first() -> None:
    embeddings = torch.eye(6)
    arms = [Arm(0, 0), Arm(0, 1), Arm(1, 2), Arm(1, 0)]
    assert likeness(arms, [Arm(0, 0)], embeddings)[:, 0].tolist() == [1.0, 0.25, 0.0, 0.0]
    assert choose(arms, [], embeddings, 3) == [Arm(0, 0), Arm(1, 2), Arm(0, 1)]
    assert choose(arms, [], embeddings, 9) == choose(arms, [], embeddings, 4)
    good, bad = (Arm(0, 5), 0.3), (Arm(1, 5), -0.3)
    assert [arm.place for arm in choose(arms, [good, bad] * 4, embeddings, 2)] == [0, 0], "where it gained"
    similar = torch.eye(6)
    similar[3] = torch.tensor([0.1, 0, 0, 0, 0, 1.0])
    arms = [Arm(2, 4), Arm(2, 3)]
    assert choose(arms, [(Arm(2, 5), 0.3), (Arm(2, 2), 0.3)], similar, 1) == [Arm(2, 3)], "what is like what gained"


def test_words_are_proposed_as_the_model_expects_them() -> None:
    expected = torch.full((3, 40), -30.0)
    expected[0, 5], expected[1, 6], expected[2, 7] = 0.0, 0.0, 0.0
    embeddings = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    embeddings[9] = embeddings[0] + 0.01
    arms = propose([0, 1], expected, embeddings, 3, torch.Generator().manual_seed(0))
    assert arms[:3] == [Arm(0, 5), Arm(1, 6), Arm(2, 7)]
    assert Arm(0, 9) in arms, "the nearest word"
    assert len(arms) == len(set(arms)) > 25
    assert not {arm.word for arm in arms} & {0, 1}
    assert {arm.place for arm in propose([0, 1], expected, embeddings, 2, torch.Generator().manual_seed(0))} == {0, 1}


def test_feedback_finds_more_than_the_same_number_of_random_edits() -> None:
    """On tables in which words of one kind help at some places. A difference of several deviations, over forty tables."""
    gains: dict[str, list[float]] = {"feedback": [], "random": []}
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        kinds = torch.arange(60) % 6
        embeddings = torch.eye(6)[kinds] + 0.1 * torch.randn(60, 6, generator=generator)
        table = torch.randn(4, 6, generator=generator)[:, kinds] + 0.2 * torch.randn(4, 60, generator=generator)
        lexicon = Lexicon(embeddings, lambda prompt: torch.zeros(len(prompt) + 1, 60))

        def costs(prompts: Sequence[Sequence[int]], table: Tensor = table) -> list[float]:
            return [-float(table[range(4), prompt].sum()) for prompt in prompts]

        start, budget = [0, 1, 2, 3], Budget(8, 5, 4)
        (before,) = costs([start])
        gains["feedback"].append(before - costs([edit(start, lexicon, budget, costs, generator)])[0])
        draw, current = random.Random(seed), start
        for _ in range(budget.generations):
            tries = [current]
            for _ in range(budget.population):
                place, word = draw.randrange(4), draw.randrange(60)
                tries.append([*current[:place], word, *current[place + 1 :]])
            current = min(tries, key=lambda prompt: costs([prompt])[0])
        gains["random"].append(before - costs([current])[0])
    difference = torch.tensor(gains["feedback"]) - torch.tensor(gains["random"])
    assert float(difference.mean() / difference.std() * len(difference) ** 0.5) > 3


def test_what_a_model_expects_is_what_plain_transformers_say(small: Small) -> None:
    model = AutoModelForCausalLM.from_pretrained(small.model, dtype=torch.float32).eval()
    words, tokenizer = ((5,), (6, 7), (9,)), AutoTokenizer.from_pretrained(small.model)
    client = LocalClient("ash", small.folder, small.folder, None, (), None)
    lexicon = lexicon_of(as_ids(words), Decoder(Checkpoint(small.model)), client)
    with torch.no_grad():
        logits = model(torch.tensor([[tokenizer.eos_token_id, 6, 7, 9]])).logits[0].log_softmax(1)
    found = lexicon.expected([1, 2])
    torch.testing.assert_close(found, logits[[0, 2, 3]][:, [5, 6, 9]], rtol=0, atol=1e-5)
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(lexicon.embeddings[1], (table[6] + table[7]) / 2)
    for ids in (
        torch.tensor([[5], [99999]], dtype=torch.int32),
        torch.tensor([[5], [-1]], dtype=torch.int32),
        as_ids(words).long(),
    ):
        with pytest.raises(FedgroveError, match="client 'ash': the list of words that came is none of this model; refused"):
            lexicon_of(ids, Decoder(Checkpoint(small.model)), client)


# A whole stage


@pytest.fixture(scope="module")
def run(small: Small, files: Mapping[str, Path]) -> Path:
    return small.undisturbed(**voting(files))


def test_a_round_never_makes_the_prompt_worse(run: Path) -> None:
    """All records are scored in every round, so the right labels of the prompt that stays never become fewer."""
    found, about = measurements(run), json.loads((run / "prompt.json").read_text())
    assert [found[0, round_, None, "records"] for round_ in range(3)] == [3 + 4 + 5] * 3
    wrong = [about["finalists"][0], found[0, 0, None, "best"], found[0, 1, None, "best"], about["finalists"][-1]]
    assert wrong[0] >= wrong[1] >= wrong[2] == wrong[3]
    assert wrong[0] > wrong[2], "and here it makes it better"
    assert about["finalists"][about["best"]] == min(about["finalists"])
    assert (about["aggregation"], about["score"]) == ("votes", "correct")


def test_secure_sums_in_another_order_of_clients_give_the_same_prompt(
    small: Small, files: Mapping[str, Path], tmp_path: Path, run: Path
) -> None:
    changes = voting(files, CLIENTS[::-1], privacy={"secure_aggregation": True})
    assert cli("run", small.job("secure-votes", **changes), "--out", tmp_path / "run")[0] == 0
    same(run, tmp_path / "run")


def test_a_killed_run_goes_on_to_the_same_bits(small: Small, files: Mapping[str, Path], tmp_path: Path, run: Path) -> None:
    """Killed twice: while votes are written, and while the scores that follow them are."""
    file, out = small.job("killed-votes", **voting(files)), tmp_path / "run"
    killed("run", file, "--out", out, "--quiet", moment=Moment("os.rename", "*/work/stage-0/votes-1.safetensors", "cut"))
    again = Moment("os.rename", "*/work/stage-0/scores-1.json", "cut")
    killed("run", file, "--out", out, "--resume", "--quiet", moment=again)
    assert cli("run", file, "--out", out, "--resume")[0] == 0
    same(run, out)


def test_no_word_of_a_clients_text_is_in_a_prompt_unless_it_is_public(small: Small, run: Path) -> None:
    """The server's files hold neither the canary nor its tokens, and a prompt has words of the list and the start alone."""
    tokenizer = AutoTokenizer.from_pretrained(small.model)
    about = json.loads((run / "prompt" / "prompt.json").read_text())
    allowed = {*encode(" It is a", tokenizer), *(token for word in PUBLIC for token in encode(f" {word}", tokenizer))}
    assert set(about["ids"]) <= allowed
    assert not set(encode(f" {CANARY}", tokenizer)) <= allowed
    server = [file for file in run.rglob("*") if file.is_file() and "clients" not in file.parts]
    assert server
    assert not [file for file in server for word in CANARY.split() if word.encode() in file.read_bytes()]
    assert any(CANARY in line["text"] for line in lines(small.folder / "edited-ash.jsonl"))


def test_a_report_says_who_voted(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    assert Disclosure.PROMPT_WORDS.sentence in page
    assert "every client edited the prompt" in page
    assert isinstance(json.loads((run / "prompt.json").read_text())["words_of_one"], list)
    assert measurements(run)[0, 0, None, "calls"] >= 12 * (1 + 5 + 2), "of edits, and of at least two prompts"
    sent = {line["kind"]: line["bytes"] for line in lines(run / "ledger.jsonl") if line["direction"] == "up"}
    assert sent["prompt/votes"] < 1500


# Mistakes, and lies


@pytest.mark.parametrize(("stage", "says"), [
    ({"aggregation": "pooled", "generations": None}, 'aggregation: method = "tokens" has "votes"'),
    ({"choices": 5000}, "choices: votes are for 4,096 words at most; lower it"),
    ({"choices": 3}, "choices: 3 words are too few for a prompt of 4; give 4 or more, or lower tokens"),
    ({"tokens": 2}, "stages.0.start: it has 3 tokens, but a prompt has 2 at most; shorten it, or raise tokens"),
    ({"labels": []}, 'score: "correct" counts right labels; give labels, or score = "loss"'),
    ({"dimension": 3}, 'dimension: method = "tokens" does not use it; remove it'),
    ({"against_overfitting": 0.5}, 'against_overfitting: it belongs to aggregation = "local"; remove it'),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(small: Small, files: Mapping[str, Path], stage: dict[str, Any], says: str) -> None:
    assert says in complaint("plan", small.job("wrong-votes", **voting(files, **stage)))


def ballot(words: int = 6) -> tuple[VoteForWords, dict[str, Tensor]]:
    request = VoteForWords(
        stage=0, method="tokens", aggregation="votes", labels=LABELS, score="correct", place="end", length=16, records=8,
        seed="0/0", population=3, generations=2, tokens=3, words=words,
    )  # fmt: skip
    votes, places = torch.tensor([1, 0, 0, 1, 1, 0]), torch.tensor([2, 0, 0, 0, 1, 0])
    return request, {VOTES: votes.int(), PLACES: places.int(), CALLS: torch.tensor([56])}


@pytest.mark.parametrize(("name", "values", "says"), [
    (VOTES, [2, 0, 0, 1, 0, 0], "more votes"), (VOTES, [-1, 0, 0, 1, 1, 0], "more votes"),
    (VOTES, [1, 1, 0, 1, 1, 0], "more votes"), (PLACES, [3, 0, 0, 0, 1, 0], "no places"),
    (PLACES, [2, 0, 1, 0, 1, 0], "no places"), (PLACES, [2, 0, 0, 0, 0, 0], "a place each"),
    (PLACES, [2, 0, 0, -1, 1, 0], "no places"), (CALLS, [10**6], "more scores"), (CALLS, [-1], "more scores"),
])  # fmt: skip
def test_votes_that_no_prompt_has_are_refused(name: str, values: list[int], says: str) -> None:
    request, honest = ballot()
    request.check(honest, Reply(), None)
    request.check({VOTES: honest[VOTES] * 0, PLACES: honest[PLACES] * 0, CALLS: honest[CALLS]}, Reply(), None)
    with pytest.raises(WireError, match=says):
        request.check({**honest, name: torch.tensor(values, dtype=honest[name].dtype)}, Reply(), None)


def test_sums_that_no_clients_have_are_refused() -> None:
    request, honest = ballot()
    total = {name: 3 * tensor for name, tensor in honest.items()}
    request.check_sums(total, 3)
    with pytest.raises(WireError, match="more votes"):
        request.check_sums(total, 2)


@pytest.mark.parametrize(("name", "tensor"), [
    ("prompt", torch.tensor([0, 6], dtype=torch.int32)), ("prompt", torch.tensor([-1], dtype=torch.int32)),
    ("prompt", torch.tensor([0, 1])), ("prompt", torch.zeros(0, dtype=torch.int32)),
    ("prompt", torch.zeros(4, dtype=torch.int32)), ("prompt", torch.zeros(1, 1, dtype=torch.int32)),
    ("words", torch.ones(5, 1, dtype=torch.int32)), ("words", torch.ones(6, dtype=torch.int32)),
    ("words", torch.ones(6, 1)), ("more", torch.ones(1)),
])  # fmt: skip
def test_a_client_edits_only_what_can_be_a_prompt(name: str, tensor: Tensor) -> None:
    task = Task("0/0", 3, 3, words=((0,),) * 6)
    honest = {"prompt": torch.tensor([0, 5], dtype=torch.int32), "words": torch.ones(6, 1, dtype=torch.int32)}
    assert tokens.fits(honest, task)
    assert not tokens.fits({**honest, name: tensor}, task)
