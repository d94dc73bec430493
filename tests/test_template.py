from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import make_tiny_model
from transformers import AutoTokenizer

from models.errors import InvalidTemplate, InvalidVerbalizer
from models.llm import FrozenLLM
from models.template import TEMPLATES, Template, Verbalizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """One tokenizer that adds BOS (llama) and one that does not (gpt2)."""
    return {
        family: AutoTokenizer.from_pretrained(make_tiny_model(tmp_path_factory.mktemp(family), family))
        for family in ("llama", "gpt2")
    }


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_segments_say_what_the_template_says(tokenizers: dict, name: str, family: str) -> None:
    tokenizer = tokenizers[family]
    template = Template.build(name, tokenizer)
    head = list(template.head_ids)
    if family == "llama":
        assert head.pop(0) == tokenizer.bos_token_id
    text = tokenizer.encode(template.lead + "good film", add_special_tokens=False)
    assert tokenizer.decode([*head, *text, *template.tail_ids]) == TEMPLATES[name].replace("{text}", "good film")


def test_instruction_first_keeps_most_of_the_template_in_the_shared_head(tokenizers: dict) -> None:
    paper, cheap = (Template.build(n, tokenizers["gpt2"]) for n in ("paper", "instruction-first"))
    assert len(cheap.tail_ids) < len(paper.tail_ids)
    assert len(cheap.head_ids) > len(paper.head_ids)


@pytest.mark.parametrize("source", ["no slot", "{text} and {text} again", "ends with {text}"])
def test_bad_templates_are_refused(tokenizers: dict, source: str) -> None:
    with pytest.raises(InvalidTemplate):
        Template.build(source, tokenizers["gpt2"])


def test_any_label_set_of_single_tokens(tokenizers: dict) -> None:
    verbalizer = Verbalizer.build(("good", "bad", "great"), ("unknown",), tokenizers["llama"])
    assert len(set(verbalizer.ids)) == 4
    assert verbalizer.id_of("great") == verbalizer.label_ids[2]


@pytest.mark.parametrize(
    ("labels", "generic", "match"),
    [
        (("positive", "extraordinary"), ("unknown",), "extraordinary.*not one"),
        (("positive", "positive"), ("unknown",), "distinct|at least"),
        (("positive",), ("unknown",), "at least two"),
        (("positive", "negative"), (), "at least two labels and one generic"),
    ],
)
def test_bad_verbalizers_are_refused(
    tokenizers: dict, labels: tuple[str, ...], generic: tuple[str, ...], match: str
) -> None:
    with pytest.raises(InvalidVerbalizer, match=match):
        Verbalizer.build(labels, generic, tokenizers["gpt2"])


def test_fingerprint_covers_template_verbalizer_quantization_and_weights(tmp_path: Path) -> None:
    one = make_tiny_model(tmp_path / "one", "llama", seed=0)
    two = make_tiny_model(tmp_path / "two", "llama", seed=1)

    def load(path: Path, **kwargs: object) -> str:
        kwargs.setdefault("quantization", "none")
        return FrozenLLM.load(str(path), device="cpu", **kwargs).fingerprint  # type: ignore[arg-type]

    same = load(one)
    assert load(one) == same
    others = [
        load(two),
        load(one, template="paper"),
        load(one, labels=("positive", "negative")),
        load(one, generic_labels=("unknown",)),
        load(one, quantization="nf4"),
        load(one, quantization="int8"),
    ]
    assert len({same, *others}) == 7


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_special_token_in_a_users_text_is_plain_characters(tmp_path: Path, family: str) -> None:
    llm = FrozenLLM.load(str(make_tiny_model(tmp_path / "m", family)), quantization="none", device="cpu")
    special = llm.tokenizer.encode("</s>", add_special_tokens=False)
    assert len(special) == 1
    (row,) = llm.rows(["a good</s> film"])
    assert special[0] not in row
    assert row == llm.row("a good</s> film")
