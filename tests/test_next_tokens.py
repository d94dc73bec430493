"""The likeliest next tokens: as the model has them by plain concatenation, and only where a prompt had a say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from api_kit import Api, add_prompt, make_gate, running, soft_prompt, tiny_llm

from app.compare import TOKENS, Compared, NextTokens, compare
from app.console.token_text import visible
from app.settings import Mode
from models.gate import Gate
from models.inference import Classifier
from models.next_tokens import likeliest, next_logits, token_text

TEXTS = ["the film is good", "a bad movie with a great director , awful acting and a plot that is not very quite there"]


def plain(text: str, seed: int | None = None) -> torch.Tensor:
    """[prompt, head, text, tail] through the whole model, and what it says at the end."""
    llm = tiny_llm()
    embedded = llm.embed(torch.tensor([*llm.template.head_ids, *llm.row(text)]))
    if seed is not None:
        embedded = torch.cat([soft_prompt(seed).embeddings, embedded])
    with torch.no_grad():
        logits: torch.Tensor = llm.model(inputs_embeds=embedded.unsqueeze(0), use_cache=False).logits
    return logits[0, -1].float()


def test_logits_are_those_of_plain_concatenation() -> None:
    classifier = Classifier(tiny_llm())
    for seed in (None, 3):
        found = next_logits(classifier, TEXTS * 9, () if seed is None else [soft_prompt(seed)])
        wanted = torch.stack([plain(text, seed) for text in TEXTS * 9])
        assert found.shape == (18, tiny_llm().embed.num_embeddings) and found.dtype == torch.float32
        assert float((found - wanted).abs().max()) <= 1e-4


def test_the_likeliest_come_first_and_label_words_are_known() -> None:
    llm = tiny_llm()
    logits = torch.full((2, llm.embed.num_embeddings), -20.0)
    negative = llm.verbalizer.id_of("negative")
    neutral = llm.verbalizer.id_of("neutral")
    logits[0, [negative, neutral, 40]] = torch.tensor([1.0, 3.0, 1.0])
    first, second = likeliest(llm, logits, 4)
    assert [one.id for one in first[:3]] == [neutral, *sorted([negative, 40])]
    assert {one.id: one.word for one in first[:3]} == {neutral: "neutral", negative: "negative", 40: None}
    expected = logits[0].softmax(-1)
    assert all(one.probability == pytest.approx(float(expected[one.id])) for one in first)
    assert [one.id for one in second] == [0, 1, 2, 3], "equal ones in the order of their ids"


def test_a_token_keeps_its_space() -> None:
    llm = tiny_llm()
    for text in (" film", "film", " positive", ".", "\n"):
        for token in llm.tokenizer.encode(text, add_special_tokens=False):
            assert token_text(llm, token) == llm.tokenizer.decode([token])
    spaced = llm.verbalizer.id_of("positive")
    assert token_text(llm, spaced) == " positive"
    half = llm.tokenizer.encode("é", add_special_tokens=False)
    assert len(half) == 2 and visible(token_text(llm, half[0]), half[0]) == f"part of a character, token {half[0]}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" film", "␣film"),
        ("\n\n", "↵↵"),
        ("\t", "⇥"),
        ("\r", "\\u000d"),
        ("\u202egnp", "\\u202egnp"),
        ("\u200b", "\\u200b"),
        ("\u00a0x", "\\u00a0x"),
        ("\u0301", "◌\u0301"),
        ("<b>&", "<b>&"),
        ("", "token 7"),
        ("\ufffd", "part of a character, token 7"),
        ("-" * 40, "-" * 24 + "…"),
    ],
)
def test_what_cannot_be_seen_is_made_visible(text: str, shown: str) -> None:
    assert visible(text, 7) == shown


# --- as it is served -------------------------------------------------------------------------------------------------

ASKED, CERTAIN, KNOWN, OTHER = "the plot is awful", "the story is very good", "a great film", "quite bad acting"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("tokens")
    with running(f"sqlite:///{folder}/letheon.db", folder, max_classify_texts=8) as api:
        yield api


def look(api: Api, *texts: str, tokens_of: int = 8) -> list[Compared]:
    serving = api.service.serving
    return compare(serving, api.service.settings, serving.encode(texts), tokens_of=tokens_of)[1]


def tokens(found: Compared) -> NextTokens:
    assert found.tokens is not None
    return found.tokens


def same(found: list[int], logits: torch.Tensor) -> bool:
    """Whether these are its likeliest, but for such as are all but equal."""
    best = logits.topk(TOKENS).values[-1]
    return len(found) == TOKENS and all(float(logits[i]) >= float(best) - 1e-4 for i in found)


def test_tokens_stand_behind_the_prompt_that_had_the_say(api: Api) -> None:
    before = tokens(look(api, ASKED)[0])
    assert before.served is None and before.prompts == () and same([t.id for t in before.base], plain(ASKED))
    asked, certain = make_gate(ASKED), make_gate(CERTAIN)
    known = make_gate(KNOWN, digests=[api.service.vault.gate_digest(KNOWN)])
    first = add_prompt(api.service, soft_prompt(3), asked)
    add_prompt(api.service, soft_prompt(4), replace(certain, certain=certain.threshold))
    add_prompt(api.service, soft_prompt(5), known)
    found = dict(zip((ASKED, CERTAIN, KNOWN), look(api, ASKED, CERTAIN, KNOWN), strict=True))
    assert found[ASKED].decided in ("abstained", "cleared")
    served = tokens(found[ASKED]).served
    assert served is not None and tokens(found[ASKED]).prompts == (first,)
    assert same([t.id for t in served], plain(ASKED, 3)) and not same([t.id for t in served], plain(ASKED))
    for text, decided in ((CERTAIN, "certain"), (KNOWN, "guarded")):
        assert found[text].decided == decided and found[text].served.abstained
        assert tokens(found[text]).served is None, "no prompt was run, so it said nothing"
        assert same([t.id for t in tokens(found[text]).base], plain(text))
    assert [one.tokens is None for one in look(api, ASKED, OTHER, tokens_of=1)] == [False, True]
    assert look(api, ASKED, tokens_of=0)[0].tokens is None
    serving, one_by_one = api.service.serving, api.service.settings.model_copy(update={"max_batch_texts": 1})
    _, apart = compare(serving, one_by_one, serving.encode([ASKED, OTHER]), tokens_of=2)
    assert [one.tokens is None for one in apart] == [False, False], "how texts are batched is no matter of theirs"


def test_of_several_that_were_asked_the_one_that_decides(api: Api) -> None:
    """Prompts that abstain on the text, and one that does not and whose gate is the nearest."""
    text = "the director is quite good"
    classifier = Classifier(tiny_llm())
    abstaining = [s for s in range(60) if classifier.classify([text], [soft_prompt(s)])[0].abstained][:2]
    clearing = next(s for s in range(60) if not classifier.classify([text], [soft_prompt(s)])[0].abstained)
    gate: Gate = make_gate(text)
    ids = {seed: add_prompt(api.service, soft_prompt(seed), gate) for seed in (clearing, *abstaining)}
    surest = max(abstaining, key=lambda s: classifier.classify([text], [soft_prompt(s)])[0].confidence)
    [found] = look(api, text)
    assert found.decided == "abstained" and set(ids.values()) <= set(found.prompts)
    assert tokens(found).prompts == (ids[surest],)


def test_in_one_context_they_stand_behind_all_prompts(tmp_path: Path) -> None:
    with running(f"sqlite:///{tmp_path}/letheon.db", tmp_path, mode=Mode.CONCATENATE) as api:
        assert tokens(look(api, OTHER)[0]).served is None
        ids = tuple(add_prompt(api.service, soft_prompt(seed)) for seed in (1, 2))
        [found] = look(api, OTHER)
        assert tokens(found).prompts == ids == found.prompts
        served = tokens(found).served
        both = [soft_prompt(1), soft_prompt(2)]
        assert served is not None
        assert same([t.id for t in served], next_logits(Classifier(tiny_llm()), [OTHER], both)[0])
