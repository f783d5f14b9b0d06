"""Generation: how similar generated texts are to reference texts, by ROUGE and BLEU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedgrove.data.tokens import encode_prompt
from fedgrove.errors import FedgroveError
from fedgrove.evaluation.metrics import Measured, bootstrap, mean
from fedgrove.events import OnProgress

ROUGES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Written:
    """The model's output for one prompt, and the references."""

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
    """Generates an output for every prompt by greedy decoding, up to the end-of-text token.

    Records with the same prompt are merged: their answers are all references, as in the E2E challenge. If no reference has a
    line break, an output ends at its first one.

    Args:
        model: a causal language model of the transformers library.
        pairs: (prompt, reference), in the form that a tuning stage uses.
        tokens: the maximum number of generated tokens.
        on_progress: called after every prompt.

    Raises:
        FedgroveError: a prompt is empty.
    """
    references: dict[str, list[str]] = {}
    for prompt, reference in pairs:
        references.setdefault(prompt, []).append(reference)
    one_line = not any("\n" in reference.strip() for _, reference in pairs)
    device = next(model.parameters()).device
    written = []
    for number, (prompt, refs) in enumerate(references.items(), 1):
        ids = torch.tensor([encode_prompt(prompt, tokenizer)], dtype=torch.int64, device=device)
        if not prompt:
            raise FedgroveError("generation: a prompt is empty", "fix its template")
        with torch.inference_mode():
            generated = cast(Any, model).generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        output = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).strip()
        written.append(Written(prompt, output.split("\n")[0].strip() if one_line else output, tuple(refs)))
        on_progress(number, len(references))
    return written


def compare(written: Sequence[Written]) -> dict[str, Measured]:
    """ROUGE-1, -2 and -L (F1, best over the references; package ``rouge-score``) and corpus BLEU (``sacrebleu``).

    All range from 0 to 1. ROUGE (Lin 2004) is computed by Google's implementation without stemming; BLEU (Papineni et al. 2002)
    by sacrebleu with its defaults.

    Raises:
        FedgroveError: the extra is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise FedgroveError(f"generation needs rouge-score and sacrebleu: {INSTALL} ({error.name} is missing)") from error
    scorer, bleu = RougeScorer(list(ROUGES)), BLEU()
    scores = [scorer.score_multi(one.references, one.output) for one in written]
    rouge = {name: mean([score[name].fmeasure for score in scores]) for name in ROUGES}
    counts = []
    for one in written:
        score = bleu.corpus_score([one.output], [[reference] for reference in one.references])
        counts.append((*score.counts, *score.totals, score.sys_len, score.ref_len))

    def corpus_bleu(sums: Sequence[float]) -> float:
        *ngrams, sys_len, ref_len = (round(number) for number in sums)
        return float(BLEU.compute_bleu(ngrams[:4], ngrams[4:], sys_len, ref_len, smooth_method="exp").score) / 100

    return {**rouge, "bleu": bootstrap(counts, corpus_bleu)}


INSTALL = 'pip install "fedgrove[evaluate]"'
