"""Records of many shapes become the same examples, and their tokens the wanted mask."""

from typing import Any

import pytest
from tokenizers import Tokenizer

from fulmen.data.conversations import Example, RecordError, Turn, parse_example
from fulmen.data.image_encoding import SpecialIds, tokenise_example
from fulmen.data.tokenise import train_tokenizer
from fulmen.models.image_layout import Tiling, image_layout


def test_images_come_first_where_the_text_names_none() -> None:
    assert parse_example({"text": "a cat"}, 2) == Example(((Turn("", (0, 1, "a cat"), True),),))
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hm?"}]
    messages += [{"role": "assistant", "content": "yes"}]
    (turns,) = parse_example({"messages": messages}, 1).documents
    assert [turn.parts for turn in turns] == [("be kind",), (0, "hm?"), ("yes",)]
    assert [turn.learnt for turn in turns] == [False, False, True]


def test_placeholders_are_filled_in_order() -> None:
    (turns,) = parse_example({"text": "<image>one<image><image> two"}, 3).documents
    assert turns[0].parts == (0, "one", 1, 2, " two")


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "<image>\nwhy?"}, {"role": "assistant", "content": "so"}],
        [{"from": "human", "value": "<image>\nwhy?"}, {"from": "gpt", "value": "so"}],
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhy?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "so"}]},
        ],
    ],
)
def test_shapes_of_conversations(messages: Any) -> None:
    wanted = (Turn("user", (0, "\nwhy?"), False), Turn("assistant", ("so",), True))
    assert parse_example({"messages": messages}, 1).documents == (wanted,)


def test_shapes_of_pairs() -> None:
    question = {"role": "user", "content": "<image>why?"}
    good, bad = ({"role": "assistant", "content": one} for one in ("so", "no"))
    for record in (
        {"prompt": "<image>why?", "chosen": "so", "rejected": "no"},
        {"prompt": [question], "chosen": good, "rejected": bad},
        {"messages": [question], "chosen": [good], "rejected": [bad]},
        {"chosen": [question, good], "rejected": [question, bad]},
    ):
        asked = Turn("user", (0, "why?"), False)
        assert parse_example(record, 1).documents == (
            (asked, Turn("assistant", ("so",), True)),
            (asked, Turn("assistant", ("no",), True)),
        )


def test_earlier_answers_of_a_pair_are_not_learnt() -> None:
    talk = [("user", "a"), ("assistant", "b"), ("user", "c")]
    prompt = [{"role": role, "content": text} for role, text in talk]
    example = parse_example({"prompt": prompt, "chosen": "d", "rejected": "e"}, 0)
    for turns in example.documents:
        assert [turn.learnt for turn in turns] == [False, False, False, True]


def test_pairs_after_different_turns() -> None:
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    bad = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(RecordError) as raised:
        parse_example({"chosen": good, "rejected": bad}, 0)
    assert raised.value.kind == "unequal_prompts"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    special = ["<image>", "<begin>", "<end>"]
    made = train_tokenizer(
        iter(["ab"]), vocab_size=260, end_of_document="<eod>", special_tokens=special
    )
    made.encode_special_tokens = True
    return made


IDS = SpecialIds(end_of_document=0, image=1, begin_turn=2, end_turn=3)
LAYOUT = image_layout(28, 28, Tiling(28, 14, max_tiles=0))


def shown(tokenizer: Tokenizer, tokens: list[int], learnt: list[int]) -> str:
    """The text, with what is learnt in brackets."""
    text, inside = "", False
    for token, mask in zip(tokens, learnt, strict=True):
        if bool(mask) != inside:
            text, inside = text + ("[" if mask else "]"), bool(mask)
        text += tokenizer.decode([token], skip_special_tokens=False)
    return text + ("]" if inside else "")


def test_mask_of_a_conversation(tokenizer: Tokenizer) -> None:
    talk = [("user", "<image>a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in talk]
    example = parse_example({"messages": messages}, 1)
    tokens, learnt, chosen, placed = tokenise_example(example, [LAYOUT], IDS, tokenizer)
    assert shown(tokenizer, tokens, learnt) == (
        "<begin>user name=user\n<image><image><image><image>a<end>\n"
        "<begin>ai name=assistant\n[b<end>]\n"
        "<begin>user name=user\nc<end>\n"
        "<begin>ai name=assistant\n[d<end>]<eod>"
    )
    assert chosen == 0
    assert placed == [(0, len("user name=user\n") + 1)]


def test_mask_of_a_caption_and_of_a_pair(tokenizer: Tokenizer) -> None:
    caption = parse_example({"text": "ab"}, 1)
    tokens, learnt, _, _ = tokenise_example(caption, [LAYOUT], IDS, tokenizer)
    assert shown(tokenizer, tokens, learnt) == "<image><image><image><image>[ab<eod>]"
    first = parse_example({"text": "ab<image>c"}, 1)
    tokens, learnt, _, _ = tokenise_example(first, [LAYOUT], IDS, tokenizer)
    # The first token of all has nothing before it.
    assert learnt == [0, 1, 0, 0, 0, 0, 1, 1]
    pair = parse_example({"prompt": "<image>q", "chosen": "a", "rejected": "b"}, 1)
    tokens, learnt, chosen, placed = tokenise_example(pair, [LAYOUT], IDS, tokenizer)
    half = "<begin>user name=user\n<image><image><image><image>q<end>\n<begin>ai name=assistant\n"
    assert shown(tokenizer, tokens, learnt) == f"{half}[a<end>]<eod>{half}[b<end>]<eod>"
    assert chosen == len(tokens) // 2
    assert placed == [(0, 16), (0, 16 + chosen)]


def test_special_tokens_cannot_be_spelt(tokenizer: Tokenizer) -> None:
    content = [{"type": "text", "text": "<end><image>"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "<end>x"}]
    example = parse_example({"messages": messages}, 0)
    tokens, _, _, _ = tokenise_example(example, [], IDS, tokenizer)
    assert tokens.count(IDS.end_turn) == 2
    assert IDS.image not in tokens
