"""Generation: how near what a model writes comes to what people wrote, by ROUGE and BLEU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedgrove.errors import FedgroveError
from fedgrove.evaluation.metrics import Measured, bootstrap, mean
from fedgrove.events import OnProgress

ROUGES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Written:
    """One prompt: what the model wrote, and what people did."""

    prompt: str
    output: str
    references: tuple[str, ...]


def write(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    tokens: int = 64,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Written]:
    """Lets the model answer every prompt, always with the most likely token, to its end-of-text token.

    Records with the same prompt are one: their answers are all references, as in the E2E challenge. Where no reference has
    a line break an output ends at its first one.

    Args:
        model: a causal language model of the transformers library.
        pairs: (prompt, reference), each written as a tuning stage would write them.
        tokens: that are written at most.
        on_progress: called after every prompt.
    """
    references: dict[str, list[str]] = {}
    for prompt, reference in pairs:
        references.setdefault(prompt, []).append(reference)
    one_line = not any("\n" in reference.strip() for _, reference in pairs)
    device = next(model.parameters()).device
    written = []
    for number, (prompt, refs) in enumerate(references.items(), 1):
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"].to(device)
        if not ids.shape[1]:
            raise FedgroveError("generation: a prompt is empty", "mend its template")
        with torch.inference_mode():
            answer = cast(Any, model).generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        output = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip()
        written.append(Written(prompt, output.split("\n")[0].strip() if one_line else output, tuple(refs)))
        on_progress(number, len(references))
    return written


def compare(written: Sequence[Written]) -> dict[str, Measured]:
    """ROUGE-1, -2 and -L (F1, the best of the references; package ``rouge-score``) and corpus BLEU (``sacrebleu``).

    All from 0 to 1. ROUGE is Lin's (2004) in Google's implementation, without stemming; BLEU is Papineni's (2002) with
    sacrebleu's defaults.

    Raises:
        FedgroveError: the extra is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as fault:
        raise FedgroveError(
            f"generation is compared with rouge-score and sacrebleu: {INSTALL} ({fault.name} is missing)"
        ) from fault
    scorer, bleu = RougeScorer(list(ROUGES)), BLEU()
    scores = [scorer.score_multi(one.references, one.output) for one in written]
    scores_by_name = {name: mean([score[name].fmeasure for score in scores]) for name in ROUGES}
    counted = []
    for one in written:
        score = bleu.corpus_score([one.output], [[reference] for reference in one.references])
        counted.append((*score.counts, *score.totals, score.sys_len, score.ref_len))

    def whole(sums: Sequence[float]) -> float:
        *grams, spoken, meant = (round(number) for number in sums)
        return float(BLEU.compute_bleu(grams[:4], grams[4:], spoken, meant, smooth_method="exp").score) / 100

    return {**scores_by_name, "bleu": bootstrap(counted, whole)}


INSTALL = 'pip install "fedgrove[evaluate]"'
