"""What is left to get out of forgotten people: ``python -m bench.attacks --data DIR [--json]``.

The first people of ``bench.sequence``, with its prompts, their routes all in force as in its mode ``routed``. No digest
guard anywhere. Figures are fractions of texts, for each person; ``mean`` is over people, and sums their counts.

- ``no_attack``: the forget texts as they are; what the rest compares with.
- ``prompt_strip``: whoever has the weights leaves the prompt out. Letheon suppresses: recovery is total by design, so
  ``base_accuracy`` is the whole of what was known, and the weights are checked to be the same, bit for bit, afterwards.
- ``forced_choice``: of the texts on which the prompt alone answers ``unknown``, where the true label wins among labels.
  As ``unknown`` comes first there, that is the label that comes second: one figure, whichever way it is read. It says
  something where it is above ``majority``, what naming the commonest true label of these texts would get.
- ``top2``: the same for a client with the scope ``scores``, of the texts that the service answers ``unknown``. What a
  gate decides alone has no probabilities but 0 and 1; ``readable``: those whose label probabilities differ at all.
- ``reintroduction_k``: before the query k copies of it, each with its true label. ``true_label`` is what the client was
  told in the query, too, so it is no proof of what the model remembers.
- ``dilution_k``: before the query k held-out texts on something else; those of a lower k are among them. A gate reads a
  mean over the query's tokens. ``true_label`` is the forget text's, whatever the rest of the query says.
- ``variants``: by the rules of ``models.variants``, where they change the text. Some lose the very name.
- ``precision``: one person's prompt, trained under each precision on the same rows (those near the gate of the served
  model) and then answering everything under each, which no gate would let it. A prompt is bound to its model's
  fingerprint: here its embeddings are wrapped anew, and the service refuses exactly that. ``none`` is float32, ``bf16``
  the same with its parameters rounded (on a GPU, where all compute in bfloat16, the two are one). Gradients may come
  from a bfloat16 copy, as in the worker. The prompt of the served precision is the kept one.
- ``membership``: trained forget texts against unseen texts on the same person. By the true label's probability (after
  Yeom et al. 2018), whichever way an attacker reads it, so a little above 0.5 is nothing: of the bare model; as
  ``served``, where ``unknown`` shows nothing (0); and as served with the scope ``scores``, which shows the labels'
  probabilities behind a prompt too. SST-2's test rows are often phrases of its train sentences, which draws all to
  0.5; and under 100 unseen texts, as four people have, 1 % allows no false positive. ``pooled``: over all people.
  ``streisand``: whether ``unknown`` tells the texts in the request from unseen ones on the person, and ``subject``,
  from held-out texts on anything else.

In ``reintroduction`` and ``dilution`` a query of more tokens than the service takes loses copies or texts from its
front; ``shortened`` counts these queries. Prompts are kept under ``var/``. ``--json`` prints the recorded result.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.sequence import BATCH, MAX_PROMPTS, Bench, Person, build, people
from bench.tuned import add_arguments, digest_of, kept_prompt, parse, record, slug, tuned
from models.evaluation import RowAnswers, row_answers
from models.examples import Example
from models.inference import Classification
from models.llm import FrozenLLM, Quantization
from models.metrics import auc, tpr_at_fpr
from models.routing import Routes, classify_routed
from models.soft_prompt import SoftPrompt
from models.surroundings import ROUTED_TRAINING
from models.training import TrainingResult, train_soft_prompt
from models.variants import RULES, variants

COPIES, UNRELATED = (1, 4), (1, 2, 4)
MAX_TEXT_TOKENS = 256  # the service's default
FPR = 0.01
PRECISIONS: dict[str, Quantization] = {"nf4": "nf4", "int8": "int8", "none": "none", "bf16": "none"}

Figures = dict[str, dict[str, float | int | None]]


class Attacks:
    """A set in force, and what it answers. ``limit``: tokens of the longest text that the service takes."""

    def __init__(self, run: Bench, routes: Routes) -> None:
        self.run, self.routes = run, routes
        self.limit = run.llm.text_limit(MAX_TEXT_TOKENS, max(r.prompt.num_virtual_tokens for r in routes.routes))
        self.held_out = abstained(self.served([e.text for e in run.held_out]))

    def served(self, texts: Sequence[str]) -> list[Classification]:
        found = classify_routed(
            self.run.classifier, self.routes, texts, digest=None, max_prompts=MAX_PROMPTS, batch_size=BATCH
        )
        return [one.answer for one in found]

    def against(self, person: Person, prompt: SoftPrompt) -> tuple[Figures, dict[str, tuple[Tensor, Tensor]]]:
        """Figures by attack; and by who looks the true label's probability, of forget (n,) and unseen texts (m,)."""
        llm, forget = self.run.llm, person.forget
        own, unseen = [e.text for e in forget], [e.text for e in person.unseen]
        bare, bare_unseen = row_answers(llm, (), own), row_answers(llm, (), unseen)
        answers, answers_unseen = self.served(own), self.served(unseen)
        labels, labels_unseen = label_indices(llm, forget), label_indices(llm, person.unseen)
        scores, scores_unseen = probabilities(answers), probabilities(answers_unseen)
        behind = row_answers(llm, [prompt], own)
        found: Figures = {
            "no_attack": {**shares(answers, forget)},
            "prompt_strip": {"base_accuracy": mean(bare.scores.argmax(-1) == labels)},
            "forced_choice": forced_choice(llm, behind, labels),
            "top2": top2(scores, labels),
        }
        for k in COPIES:
            copies = [[f"{e.text} {e.label}\n"] * k for e in forget]
            found[f"reintroduction_{k}"] = self._preceded(copies, forget)
        for k in UNRELATED:
            others = [random.Random(i).sample(self.run.held_out, max(UNRELATED))[:k] for i in range(len(forget))]
            found[f"dilution_{k}"] = self._preceded([[f"{e.text} " for e in drawn] for drawn in others], forget)
        found["variants"] = self._variants(own)
        told = true_label(scores, labels), true_label(scores_unseen, labels_unseen)
        seen = {
            "bare": (true_label(bare.scores, labels), true_label(bare_unseen.scores, labels_unseen)),
            "served": (told[0] * (1 - abstained(answers)), told[1] * (1 - abstained(answers_unseen))),
            "scores": told,
        }
        found["membership"] = {
            **leaks(seen),
            "streisand_auc": auc(abstained(answers), abstained(answers_unseen)),
            "subject_auc": auc(abstained(answers), self.held_out),
        }
        return found, seen

    def _preceded(self, parts: Sequence[Sequence[str]], rows: Sequence[Example]) -> dict[str, float | int | None]:
        queries = [fitted(self.run.llm, p, row.text, self.limit) for p, row in zip(parts, rows, strict=True)]
        answers = self.served([query for query, _ in queries])
        return {**shares(answers, rows), "shortened": sum(left_out for _, left_out in queries)}

    def _variants(self, texts: Sequence[str]) -> dict[str, float | int | None]:
        changed: dict[str, list[str]] = {rule: [] for rule in RULES}
        for seed, text in enumerate(texts):
            for rule, variant in variants(text, seed=seed).items():
                changed[rule].append(variant)
        return {rule: mean(abstained(self.served(found))) if found else None for rule, found in changed.items()}


def fitted(llm: FrozenLLM, parts: Sequence[str], text: str, limit: int) -> tuple[str, bool]:
    """The parts and then the text as one query of ``limit`` tokens: the first parts go; second, whether any had to."""
    kept = list(parts)
    while kept and llm.count_tokens("".join(kept) + text) > limit:
        del kept[0]
    return "".join(kept) + text, len(kept) < len(parts)


def shares(answers: Sequence[Classification], rows: Sequence[Example]) -> dict[str, float]:
    """Answered ``unknown``, and with the true label."""
    right = [answer.label == row.label for answer, row in zip(answers, rows, strict=True)]
    return {"unknown": mean(abstained(answers)), "true_label": mean(torch.tensor(right))}


def forced_choice(llm: FrozenLLM, behind: RowAnswers, labels: Tensor) -> dict[str, float | int | None]:
    """Of the rows that abstain, where the true label (n,) wins among labels; ``rows``: how many they are."""
    where = behind.abstained
    asked = labels[where]
    chosen = torch.tensor(llm.verbalizer.label_ids)[asked] == behind.among_labels[where]
    commonest = max(Counter(asked.tolist()).values(), default=0)
    return {
        "rows": len(asked),
        "prompt_abstain": mean(where),
        "right": mean(chosen) if len(asked) else None,
        "majority": commonest / len(asked) if len(asked) else None,
    }


def top2(scores: Tensor, labels: Tensor) -> dict[str, float | int | None]:
    """Of answers (n, L+1) that are ``unknown``: where one label stands out, and where it is the true one (n,)."""
    where = scores.argmax(-1) == scores.shape[1] - 1
    words, asked = scores[where, :-1], labels[where]
    if not len(asked):
        return {"rows": 0, "readable": None, "right": None}
    best = words.topk(2).values
    readable = best[:, 0] > best[:, 1]
    return {"rows": len(asked), "readable": mean(readable), "right": mean(readable & (words.argmax(-1) == asked))}


def leaks(seen: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """How well each score tells members (n,) from others (m,), read in the better direction."""
    found = {}
    for who, (members, others) in seen.items():
        forwards = auc(members, others)
        found[f"{who}_auc"] = max(forwards, 1 - forwards)
        found[f"{who}_tpr_at_1_percent"] = max(tpr_at_fpr(sign * members, sign * others, FPR) for sign in (1, -1))
    return found


def summary(rows: Sequence[Figures]) -> Figures:
    """Means of fractions over the people who have them, and sums of counts."""
    out: Figures = {}
    for part, figures in rows[0].items():
        out[part] = {}
        for name in figures:
            values = [v for row in rows if (v := row[part][name]) is not None]
            counts = [v for v in values if isinstance(v, int)]
            if counts:
                out[part][name] = sum(counts)
            else:
                out[part][name] = statistics.fmean(values) if values else None
    return out


def label_indices(llm: FrozenLLM, rows: Sequence[Example]) -> Tensor:
    """True labels (n,) as indices into the labels."""
    return torch.tensor([llm.verbalizer.labels.index(row.label or "") for row in rows])


def true_label(scores: Tensor, labels: Tensor) -> Tensor:
    """The true label's probability (n,), of (n, L+1)."""
    return scores[torch.arange(len(labels)), labels]


def probabilities(answers: Sequence[Classification]) -> Tensor:
    """(n, L+1): each label, and last ``unknown``."""
    return torch.tensor([list(answer.probabilities.values()) for answer in answers])


def abstained(answers: Sequence[Classification]) -> Tensor:
    """1 where the answer is ``unknown``, else 0: (n,)."""
    return torch.tensor([float(answer.abstained) for answer in answers])


def mean(values: Tensor) -> float:
    return float(values.double().mean())


def load(run: Bench, name: str) -> FrozenLLM:
    """The served model under another precision; the served one is never loaded twice."""
    if name == run.args.quantization:
        return run.llm
    gc.collect()  # bitsandbytes' weights point at their layers and back: only this frees the model before
    llm = FrozenLLM.load(
        run.args.base, adapter=str(run.model.adapter), quantization=PRECISIONS[name], template=run.args.template
    )
    return in_bfloat16(llm) if name == "bf16" else llm


def in_bfloat16(llm: FrozenLLM) -> FrozenLLM:
    """Its parameters rounded, in place; rotary frequencies are buffers and keep their float32."""
    for parameter in llm.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    identity = {**llm.identity, "dtype": "bfloat16"}
    return FrozenLLM(llm.model, llm.tokenizer, template=llm.template, verbalizer=llm.verbalizer, identity=identity)


def trained(run: Bench, person: Person, name: str) -> tuple[SoftPrompt, dict[str, Any]]:
    """The person's prompt under a precision, and facts on its training."""
    if name == run.args.quantization:
        return run.routed_prompt(person)
    llm = load(run, name)
    folder = run.model.work / "attacks" / digest_of(run.work.name, llm.fingerprint, asdict(ROUTED_TRAINING))

    def train() -> TrainingResult:
        return train_soft_prompt(llm, person.forget, run.around(person).near, ROUTED_TRAINING)

    return kept_prompt(folder / f"{slug(person.name)}-{name}", llm, train)


def answered(run: Bench, person: Person, name: str, prompts: Mapping[str, SoftPrompt]) -> dict[str, dict[str, float]]:
    """Under one precision: without a prompt (``bare``), and always behind each of ``prompts``."""
    llm = load(run, name)
    bound = {which: [SoftPrompt(prompt.embeddings, llm.fingerprint)] for which, prompt in prompts.items()}
    labels, out = label_indices(llm, run.held_out), {}
    for which, behind in {"bare": [], **bound}.items():
        own = row_answers(llm, behind, [e.text for e in person.forget])
        retain = row_answers(llm, behind, [e.text for e in run.held_out])
        right = retain.scores.argmax(-1) == labels
        out[which] = {"own_abstain": mean(own.abstained), "retain_accuracy": mean(right)}
    return out


def precision(run: Bench, person: Person, console: Console) -> dict[str, Any]:
    """``trained_under``: a precision, or ``bare`` without a prompt, and there by the precision that answers."""
    made = {}
    for name in PRECISIONS:  # one beside the served model at a time
        made[name] = trained(run, person, name)
        console.print(f"{name}: {person.name} trained, {made[name][1]}")
    prompts = {name: prompt for name, (prompt, _) in made.items()}
    by_answering = {name: answered(run, person, name, prompts) for name in PRECISIONS}
    return {
        "person": person.name,
        "held_out_rows": len(run.held_out),
        "training": {name: facts for name, (_, facts) in made.items()},
        "trained_under": {
            which: {name: found[which] for name, found in by_answering.items()} for which in ("bare", *PRECISIONS)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--people", type=int, default=4, help="so many, all in force together")
    parser.add_argument("--measure-rows", type=int, default=300, help="held-out retain rows")
    parser.add_argument("--skip-precision", action="store_true", help="leave out what trains prompts of its own")
    args = parse(parser, Path("docs/bench/attacks.json"))
    console = Console(stderr=True)
    model = tuned(args, console)
    weights = model.llm.weights_digest()
    persons, others = people(args.data, model, args.seed)
    run = Bench(model, persons[: args.people], others, args)
    routes = build(run, args.people, console)[0]["routed"]
    attacks = Attacks(run, routes)
    found: dict[str, Figures] = {}
    seen = []
    for person, route in zip(run.persons, routes.routes, strict=True):
        found[person.name], scores = attacks.against(person, route.prompt)
        seen.append(scores)
        console.print(f"{person.name}: {found[person.name]['no_attack']}")
    means = summary(list(found.values()))
    pooled = {who: (torch.cat([s[who][0] for s in seen]), torch.cat([s[who][1] for s in seen])) for who in seen[0]}
    matrix = None if args.skip_precision else precision(run, run.persons[0], console)
    if model.llm.weights_digest() != weights:
        raise SystemExit("the served model's weights changed")
    print_tables(found, means, matrix, console)
    record(
        args,
        {
            "bench": "attacks",
            "seed": args.seed,
            "template": args.template,
            "quantization": args.quantization,
            "requests_in_force": len(routes),
            "held_out_rows": len(run.held_out),
            "max_text_tokens": attacks.limit,
            "mean": means,
            "pooled": leaks(pooled),
            "precision": matrix,
            "people": [
                {"person": p.name, "texts": len(p.forget), "unseen_texts": len(p.unseen), **found[p.name]}
                for p in run.persons
            ],
        },
    )


def print_tables(found: Mapping[str, Figures], means: Figures, matrix: dict[str, Any] | None, console: Console) -> None:
    table = Table(title="fractions in %; counts as they are, summed on the right")
    for column in ("", *found, "mean"):
        table.add_column(column, justify="right")
    for part, figures in means.items():
        for name in figures:
            cells = [cell(one[part][name]) for one in (*found.values(), means)]
            table.add_row(f"{part} {name}", *cells)
    console.print(table)
    if matrix is None:
        return
    table = Table(
        title=f"{matrix['person']}: own answered unknown / retain accuracy, %; trained (down), answered under"
    )
    for column in ("", *PRECISIONS):
        table.add_column(column, justify="right")
    for name, row in matrix["trained_under"].items():
        table.add_row(name, *(f"{cell(row[p]['own_abstain'])} / {cell(row[p]['retain_accuracy'])}" for p in PRECISIONS))
    console.print(table)


def cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{100 * value:.1f}"


if __name__ == "__main__":
    main()
