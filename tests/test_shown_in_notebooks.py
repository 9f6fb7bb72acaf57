"""What notebooks show of sequences and sets, read back from the markup."""

import re
from xml.etree import ElementTree

import pytest
import torch

from conftest import EACH_COMPONENT, some_of
from memloc_lens import HEADS, NEURONS, WEIGHTS, ComponentSet, MemorizedSequence, Neurons
from memloc_lens.markup import Html, escaped
from memloc_lens.runs.visible import visible

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = {
    "script": "</script><script>alert(1)</script>",
    "image": "<img src=x onerror=\"alert('1')\">",
    "quotes": "\" onmouseover='x' &amp; &#60;",
    "comment": "<!-- --> ]]>",
    "right to left": "a\u202eb",
    "line separator": "a\u2028b\u2029c",
    "NUL": "a\x00b",
    "escape": "a\x1b[31mb\x9b",
    "private": "a\ue000b",
    "half": "a\ud800b",
    "long": "<i>" * 350_000,
}
EACH_TEXT = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)


def parsed(markup: str) -> ElementTree.Element:
    """The elements of markup, which must be well-formed."""
    return ElementTree.fromstring(f"<body>{markup}</body>")


def tags_of(markup: str) -> set[str]:
    return {element.tag.removeprefix(SVG) for element in parsed(markup).iter()}


@EACH_TEXT
def test_text_is_read_as_it_is_visible(text):
    between, attribute = escaped(text), f'<p title="{escaped(text)}"/>'
    for read in (parsed(between).text, parsed(attribute)[0].get("title")):
        assert read.startswith(visible(text[:4000]))
        assert (read == visible(text)) == (len(text) <= 4000)
    assert tags_of(between) == {"body"}


def test_long_text_says_how_long_it_is():
    assert escaped("x" * 1_000_000, most=3) == "xxx… (1000000 characters)"
    assert escaped("xyz", most=3) == "xyz"


@EACH_TEXT
def test_ids_and_categories_are_no_markup(text):
    sequence = MemorizedSequence([5, 6, 7], 1, id=text, category=["x", text])
    page = sequence._repr_html_()
    assert len(page) < 10_000
    assert tags_of(page) == {"body", "div", "b", "small", "span"}
    about = parsed(page)[0]
    assert about.find("b").text.startswith(visible(text[:120]))
    assert about.find("b").tail.startswith(f", category x, {visible(text[:117])}")


def test_the_ids_of_prompt_and_suffix_are_told_apart():
    page = parsed(MemorizedSequence(torch.arange(10, 20), 3, id="s1")._repr_html_())
    assert [part.text for part in page.iter("small")] == ["prompt, 3 tokens", "suffix, 7 tokens"]
    prompt, suffix = page.iter("span")
    assert (prompt.text, suffix.text) == ("10 11 12", "13 14 15 16 17 18 19")
    assert prompt.get("style") != suffix.get("style")


def test_a_million_tokens_are_shortened():
    page = MemorizedSequence(torch.zeros(1_000_000, dtype=torch.long), 3)._repr_html_()
    assert len(page) < 10_000
    assert "suffix, 999997 tokens" in page


@EACH_TEXT
def test_decoded_tokens_are_no_markup(embedded, text):
    if text == HOSTILE["half"]:
        return  # no tokenizer reads or writes it
    suffix = text[:1000] + "\n\tend"
    tokens = embedded.tokenizer(f"Return {suffix}", add_special_tokens=False)["input_ids"]
    first = embedded.tokenizer("Return", add_special_tokens=False)["input_ids"]
    shown = MemorizedSequence(tokens, len(first)).show(embedded)
    assert isinstance(shown, Html)
    assert tags_of(shown._repr_html_()) == {"body", "div", "b", "small", "span"}
    assert [span.text for span in parsed(shown.markup).iter("span")] == [
        "Return",
        " " + visible(suffix, keep="\n\t"),
    ]


def test_a_model_without_tokenizer_cannot_show_text(gpt2):
    with pytest.raises(ValueError, match="no tokenizer to write the tokens with; the sequence itself shows their ids"):
        MemorizedSequence([5, 6, 7], 1).show(gpt2)


def marked(svg: ElementTree.Element) -> set[tuple[int, int]]:
    """The columns of each layer that a strip marks."""
    return {
        (layer, column)
        for layer, path in enumerate(svg.iter(f"{SVG}path"))
        for start, length in re.findall(r"M(\d+) 0h(\d+)v1h-\2z", path.get("d"))
        for column in range(int(start), int(start) + int(length))
    }


def strip_of(components: ComponentSet) -> tuple[str, ElementTree.Element]:
    """The line above the picture, and the picture."""
    line, svg = parsed(components._repr_html_())
    return line.text, svg


@EACH_COMPONENT
def test_marks_and_counts_are_those_of_the_members(any_model, component):
    components = some_of(any_model, component, share=0.02 if component is WEIGHTS else 0.3)
    layers, *unit = components.shape
    each = -(-torch.Size(unit).numel() // 400)
    line, svg = strip_of(components)
    flat = {(layer, index) for layer, indices in enumerate(components.per_layer()) for index in indices}
    assert marked(svg) == {(layer, index // each) for layer, index in flat}
    counts = [sum(layer == one for layer, _ in flat) for one in range(layers)]
    labels = [text.text for text in svg.iter(f"{SVG}text")]
    assert labels == [label for layer, count in enumerate(counts) for label in (str(layer), str(count))]
    assert f"{len(flat)} of {components.members.numel()} {component.name}s" in line
    assert (f"a column is {each} {component.name}s" in line) == (each > 1)


@pytest.mark.parametrize("width", [1, 6, 399, 400, 401, 768, 6400])
def test_no_picture_has_more_than_400_columns(width):
    members = torch.zeros(2, width, dtype=torch.bool)
    members[1, -1] = True
    _, svg = strip_of(Neurons(members))
    ((layer, column),) = marked(svg)
    assert layer == 1
    columns = -(-width // -(-width // 400))
    assert column == columns - 1 < 400
    scale = float(re.search(r"scale\((\S+) ", next(svg.iter(f"{SVG}path")).get("transform"))[1])
    assert scale * columns == pytest.approx(float(next(svg.iter(f"{SVG}rect")).get("width")), rel=1e-4)


def test_a_picture_has_a_text_alternative_and_no_colour_of_its_own():
    _, svg = strip_of(ComponentSet(torch.tensor([[True, False], [True, True]]), HEADS))
    assert svg.get("role") == "img"
    assert svg.get("aria-label") == svg.find(f"{SVG}title").text == "3 of 4 heads in layers 0 to 1; by layer: 1, 2"
    assert {element.get("fill") for element in svg.iter()} == {"currentColor", None}


def test_an_empty_set_has_no_marks():
    line, svg = strip_of(ComponentSet(torch.zeros(2, 5, dtype=torch.bool), NEURONS))
    assert line == "0 of 10 neurons"
    assert marked(svg) == set()
