"""The floor: specs and recipes, token layouts, the registry, and what the errors say."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mitaswap.errors import MitaswapError, SwapError, nearest, unknown
from mitaswap.registry import Registry
from mitaswap.spec import Recipe, Spec, match_layers, split_top_level
from mitaswap.tokens import TokenLayout

QUICK = settings(max_examples=60, deadline=None, derandomize=True)

# ------------------------------------------------------------------------------------------- spec

NAMES = st.from_regex(r"[a-z][a-z0-9_:./-]{0,12}", fullmatch=True)
KEYS = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True)
ATOMS = (
    st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.none()
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.sampled_from(["true", "None", "2x4", "a,b", "it's", '"', "\\", "(", "1e5", "-", "relu"])
)
VALUES = st.recursive(ATOMS, lambda v: st.lists(v, max_size=3).map(tuple), max_leaves=5)


@QUICK
@given(NAMES, st.dictionaries(KEYS, VALUES, max_size=4))
def test_spec_survives_its_own_text(name: str, options: dict) -> None:
    spec = Spec(name, options)
    again = Spec.parse(str(spec))
    assert again == spec
    assert {k: repr(v) for k, v in again.options.items()} == {
        k: repr(v) for k, v in options.items()
    }, "types kept: 1, 1.0 and true differ"
    assert re.fullmatch(r"[A-Za-z0-9.-]+", spec.stem)


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("standard", "standard", {}),
        (" mita ( m = 25 , k=9 ) ", "mita", {"m": 25, "k": 9}),
        ("mita()", "mita", {}),
        ("linear(feature=relu,eps=1e-6)", "linear", {"feature": "relu", "eps": 1e-6}),
        ("agent(n=8,pool=2x4)", "agent", {"n": 8, "pool": "2x4"}),
        ("a(x=true,y=FALSE,z=none,w=None)", "a", {"x": True, "y": False, "z": None, "w": None}),
        ("timm:vit_tiny(img_size=(32,64))", "timm:vit_tiny", {"img_size": (32, 64)}),
        ("folder(path='a, (b)',mean=[0.5,1])", "folder", {"path": "a, (b)", "mean": (0.5, 1)}),
        ("a(x=(relu,none,(1,b)))", "a", {"x": ("relu", None, (1, "b"))}),
        ("hf-hub:org/name.v1", "hf-hub:org/name.v1", {}),
        # numbers are decimal ones: 0x0 is a shape like 2x4
        ("a(x=0x0,y=0x10,z=1_0,w=2j)", "a", {"x": "0x0", "y": "0x10", "z": "1_0", "w": "2j"}),
        ("a(x=(0x0,-3,+4,.5,5.,1E2))", "a", {"x": ("0x0", -3, 4, 0.5, 5.0, 100.0)}),
        ("a(x=('a,b'),y=('a,b',),z=[1])", "a", {"x": "a,b", "y": ("a,b",), "z": (1,)}),
    ],
)
def test_spec_reads(text: str, name: str, options: dict) -> None:
    assert Spec.parse(text) == Spec(name, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read '': expected NAME or NAME(option=value, ...), for instance"),
        ("(m=1)", "cannot read '(m=1)': expected NAME"),
        ("mita(m=25", "cannot read 'mita(m=25': expected NAME"),
        ("mita(25)", "cannot read '25' in 'mita(25)': expected option=value"),
        ("mita(2m=25)", "cannot read '2m=25' in 'mita(2m=25)': expected option=value"),
        ("mita(m=25,m=9)", "option 'm' is given twice in 'mita(m=25,m=9)'"),
        ("mita(m=)", "cannot read the value '' in 'mita(m=)'"),
        ("mita(m=a b)", "cannot read the value 'a b' in 'mita(m=a b)'"),
        ("mita(m=25))", "cannot read the value '25)' in 'mita(m=25))'"),
        ("mita(m={1: 2})", "the value '{1: 2}' in 'mita(m={1: 2})' is neither number, word nor"),
        ("mita(m={[]: 2})", "cannot read the value '{[]: 2}' in 'mita(m={[]: 2})'"),
        ("mita(m=({1},))", "the value '{1}' in 'mita(m=({1},))' is neither number, word nor tup"),
    ],
)
def test_spec_refuses(text: str, message: str) -> None:
    with pytest.raises(MitaswapError) as error:
        Spec.parse(text)
    assert str(error.value).startswith(message)


def test_spec_is_a_value() -> None:
    spec = Spec.parse("mita(m=25,k=9)")
    turned = Spec.parse("mita(k=9,m=25)")
    assert spec == turned and hash(spec) == hash(turned), "equal values must hash alike"
    assert hash(Spec("a", {"x": 1})) == hash(Spec("a", {"x": 1.0})), "1 == 1.0, so these are equal"
    assert len({spec, turned, spec.with_options(k=4)}) == 2
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert Spec.parse(spec) is spec


def test_with_options_leaves_the_original() -> None:
    spec = Spec.parse("mita(m=25)")
    assert str(spec.with_options(k=9, m=4)) == "mita(m=4,k=9)"
    assert str(spec) == "mita(m=25)"


def test_stem_tells_specs_apart() -> None:
    assert Spec.parse("mita(m=25,k=9)").stem == "mita-m25-k9"
    assert Spec.parse("timm:vit(img_size=32)").stem == "timm-vit-img-size32"
    assert Spec("...").stem == "spec"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a,b(c=1,d=2)", ["a", "b(c=1,d=2)"]),
        (" a , ,b, ", ["a", "b"]),
        ("a='x,y',b=[1,2]", ["a='x,y'", "b=[1,2]"]),
        (r"a='it\'s, so',b=1", [r"a='it\'s, so'", "b=1"]),
        ("blocks.[0,1].attn,3", ["blocks.[0,1].attn", "3"]),
        ("", []),
    ],
)
def test_split_top_level(text: str, parts: list[str]) -> None:
    assert split_top_level(text) == parts


# ----------------------------------------------------------------------------------------- recipe

PATHS = [f"blocks.{i}.attn" for i in range(12)]


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("*", range(12)),
        ("3", [3]),
        ("0-2,9-11", [0, 1, 2, 9, 10, 11]),
        ("blocks.9.*", [9]),
        ("blocks.1", [1]),  # a path's prefix ends at a dot: not blocks.10
        ("blocks.1.attn", [1]),
        ("blocks.[02].attn", [0, 2]),
        ("11, 3 ,3-4", [3, 4, 11]),
    ],
)
def test_patterns_name_layers(pattern: str, hits: list[int]) -> None:
    assert match_layers(pattern, PATHS) == [PATHS[i] for i in hits]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("12", "layer pattern '12' is outside the model's 12 sites (0-11)"),
        ("0-12", "layer pattern '0-12' is outside the model's 12 sites (0-11)"),
        ("5-2", "layer range '5-2' is reversed; write 2-5"),
        (
            "0,block.3.attn",
            "unknown layer pattern 'block.3.attn'. Did you mean 'blocks.3.attn'? Allowed: "
            "blocks.0.attn, blocks.1.attn,",
        ),
        ("", "the layer pattern '' names no layer"),
        (" , ", "the layer pattern ' , ' names no layer"),
    ],
)
def test_patterns_that_name_nothing(pattern: str, message: str) -> None:
    with pytest.raises(MitaswapError) as error:
        match_layers(pattern, PATHS)
    assert str(error.value).startswith(message)


def test_first_matching_rule_decides() -> None:
    recipe = Recipe.of({"0-1": "agent(n=9)", "1-2": "linear"})
    assert {p: str(s) for p, s in recipe.assign(PATHS).items()} == {
        "blocks.0.attn": "agent(n=9)",
        "blocks.1.attn": "agent(n=9)",
        "blocks.2.attn": "linear",
    }
    assert recipe.to_dict() == {"0-1": "agent(n=9)", "1-2": "linear"}
    assert str(recipe) == "0-1: agent(n=9); 1-2: linear"


def test_a_rule_that_decides_nothing_is_an_error() -> None:
    recipe = Recipe.of({"0-2": "agent(n=9)", "1": "linear"})
    with pytest.raises(MitaswapError) as error:
        recipe.assign(PATHS)
    assert str(error.value) == (
        "the rule '1': linear decides no layer, as the rules before it name all of its layers "
        "(blocks.1.attn). The first rule that names a layer decides: write exceptions first"
    )
    other_way = Recipe.of({"1": "linear", "0-2": "agent(n=9)", "*": "standard"})
    names = [spec.name for spec in other_way.assign(PATHS).values()]
    assert names == ["agent", "linear", "agent", *["standard"] * 9]
    # "*" is whatever is left, also nothing
    Recipe.of({"0-11": "linear", "*": "standard"}).assign(PATHS)


def test_recipe_of_one_spec() -> None:
    assert str(Recipe.of("mita(m=4,k=9)")) == "mita(m=4,k=9)"
    assert str(Recipe.of(Spec("linear"), layers="0-5")) == "0-5: linear"
    assert list(Recipe.of("linear").assign(PATHS)) == PATHS
    recipe = Recipe.of("linear", layers="3")
    assert Recipe.of(recipe) is recipe


def test_recipe_of_yaml(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text('3: "standard"\n"0-5": mita(m=25,k=25)\n"blocks.9.*": agent(n=49)\n')
    assert Recipe.from_yaml(file).to_dict() == {
        "3": "standard",
        "0-5": "mita(m=25,k=25)",
        "blocks.9.*": "agent(n=49)",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the recipe"),
        (b"\xff\xfe\x00\x81", "cannot read the recipe"),
        (b"a: [1", "cannot read the recipe"),
        (b"", "must map layer patterns to mechanisms"),
        (b"- mita", "must map layer patterns to mechanisms"),
        (b'"0-5": mita(m=25', "cannot read 'mita(m=25'"),
        (b'"0-5":\n  mita: {m: 25}', "must map layer patterns to mechanisms"),
        (b'"0-5":', "must map layer patterns to mechanisms"),
    ],
    ids=["missing", "binary", "broken", "empty", "list", "bad spec", "nested", "no value"],
)
def test_broken_recipes(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(MitaswapError, match=re.escape(message)):
        Recipe.from_yaml(file)


# ----------------------------------------------------------------------------------------- tokens


@QUICK
@given(st.integers(0, 9), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_layout_counts(prefix: int, height: int, width: int, suffix: int) -> None:
    layout = TokenLayout(prefix, (height, width), suffix)
    sequence = ["prefix"] * prefix + ["patch"] * (height * width) + ["suffix"] * suffix
    assert layout.tokens == len(sequence)
    assert sequence[layout.patch_slice] == ["patch"] * layout.patches
    assert sequence.count("patch") == layout.patches
    layout.check(len(sequence))
    with pytest.raises(MitaswapError):
        layout.check(len(sequence) + 1)


def test_layout_text_and_errors() -> None:
    assert str(TokenLayout(1, (14, 16))) == "1 + 14x16"
    assert str(TokenLayout(0, (2, 3), 4)) == "0 + 2x3 + 4"
    with pytest.raises(MitaswapError) as error:
        TokenLayout(1, (14, 14)).check(198, "blocks.0.attn")
    assert str(error.value) == (
        "blocks.0.attn has 198 tokens, but its layout is 1 + 14x14 = 197 tokens. "
        "Give the layout of this very sequence: TokenLayout(prefix=..., grid=(h, w), suffix=...)."
    )


@pytest.mark.parametrize(
    ("prefix", "grid", "suffix"),
    [(-1, (2, 2), 0), (0, (0, 2), 0), (0, (2, -1), 0), (0, (2, 2), -1)],
)
def test_impossible_layouts(prefix: int, grid: tuple[int, int], suffix: int) -> None:
    with pytest.raises(MitaswapError, match="needs prefix, suffix >= 0 and a grid of at least 1"):
        TokenLayout(prefix, grid, suffix)


@pytest.mark.parametrize("grid", [16, (4,), (2, 2, 2), None], ids=repr)
def test_grid_must_be_a_pair(grid: object) -> None:
    with pytest.raises(MitaswapError) as error:
        TokenLayout(1, grid)  # type: ignore[arg-type]
    assert str(error.value) == f"grid must be (h, w), rows and columns of patches, got {grid!r}"


# --------------------------------------------------------------------------------------- registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty importable package `fruits` with a registry; gone from sys.modules afterwards."""
    folder = tmp_path / "fruits"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from mitaswap.registry import Registry\nFRUITS = Registry('fruit', 'fruits')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [m for m in sys.modules if m.partition(".")[0] == "fruits"]:
        del sys.modules[name]


ENTRY = "from fruits import FRUITS\n@FRUITS.register({name!r})\nclass Entry: pass\n"


def test_registry_is_its_folder(package: Path) -> None:
    (package / "apple.py").write_text(ENTRY.format(name="apple"))
    (package / "pear.py").write_text(ENTRY.format(name="pear"))
    (package / "_base.py").write_text("raise RuntimeError('private files are not variants')\n")
    from fruits import FRUITS

    assert "fruits.apple" not in sys.modules, "nothing is loaded before the first look-up"
    assert FRUITS.names() == ["apple", "pear"]
    assert FRUITS.get("apple").name == "apple"
    assert dict(FRUITS.items()) == {n: FRUITS.get(n) for n in ("apple", "pear")}
    assert "pear" in FRUITS and "plum" not in FRUITS
    with pytest.raises(MitaswapError) as error:
        FRUITS.get("aple")
    assert str(error.value) == (
        "unknown fruit 'aple'. Did you mean 'apple'? Allowed: apple, pear. "
        "`mitaswap ls` lists them."
    )


def test_registry_takes_entry_points(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "apple.py").write_text(ENTRY.format(name="apple"))
    from fruits import FRUITS

    class Point:
        def load(self) -> object:
            return FRUITS.register("plum")(type("Plum", (), {}))

    others = {"fruits": [Point()]}
    monkeypatch.setattr("mitaswap.registry.entry_points", lambda group: others[group])
    assert FRUITS.names() == ["apple", "plum"]


def test_registry_refuses_a_name_twice(package: Path) -> None:
    (package / "apple.py").write_text(ENTRY.format(name="apple"))
    from fruits import FRUITS

    FRUITS.names()
    with pytest.raises(ValueError, match="fruit 'apple' is registered twice"):
        FRUITS.register("apple")(type("Other", (), {}))


def test_a_broken_variant_stays_an_error(package: Path) -> None:
    """A file that cannot be imported fails each look-up, not only the first."""
    (package / "apple.py").write_text(ENTRY.format(name="apple"))
    (package / "bad.py").write_text("import no_such_module_of_anyone\n")
    from fruits import FRUITS

    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_of_anyone"):
            FRUITS.get("pear")


def test_an_empty_registry_says_so() -> None:
    registry: Registry[type] = Registry("nothing", "mitaswap.operators")
    with pytest.raises(MitaswapError) as error:
        registry.get("x")
    assert str(error.value) == "unknown nothing 'x'. None exist. `mitaswap ls` lists them."


# ----------------------------------------------------------------------------------------- errors


def test_unknown_lists_at_most_twenty() -> None:
    message = str(unknown("layer", "zzz", [f"name{i:02}" for i in range(25)]))
    assert message.startswith("unknown layer 'zzz'. Allowed: name00, name01,")
    assert message.endswith("name19, ... (25 in all).")
    assert "Did you mean" not in message


AXES = ["K", "N", "k", "m", "landmark_tokens"]
VITS = ["deit3_base", "deit_base", "vit_tiny_patch16_224", "vit_tiny_r_s16", "eva02_tiny"]
LAYERS = [f"blocks.{i}.attn" for i in range(12)]


@pytest.mark.parametrize(
    ("given", "names", "meant"),
    [
        ("MiTA", ["agent", "mita"], ["mita"]),
        ("M", AXES, ["m"]),
        ("l", AXES, ["landmark_tokens"]),
        ("kk", AXES, ["K", "k"]),  # nothing tells which
        ("deit", VITS, ["deit_base", "deit3_base"]),
        ("VIT_TINY", VITS, ["vit_tiny_r_s16", "vit_tiny_patch16_224"]),
        ("attn.0", LAYERS, ["blocks.0.attn"]),
        ("block.0.attn", LAYERS, ["blocks.0.attn"]),
        ("Linaer", ["linear", "linformer"], ["linear"]),
        ("x", ["abcdefg"], []),
        ("", ["agent", "mita"], []),
    ],
)
def test_nearest_names(given: str, names: list[str], meant: list[str]) -> None:
    assert nearest(given, names) == meant


def test_several_near_names_are_all_shown() -> None:
    message = str(unknown("letter", "a", ["ab", "acd", "aefg", "ahijk", "b"]))
    assert message.startswith("unknown letter 'a'. Did you mean 'ab', 'acd' or 'aefg'? Allowed:")
    assert "Did you mean 'ab' or 'ac'?" in str(unknown("letter", "a", ["ab", "ac"]))


def test_errors_are_value_errors() -> None:
    assert issubclass(MitaswapError, ValueError) and issubclass(SwapError, MitaswapError)
