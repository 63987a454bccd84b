"""Requests of mechanisms: what is refused and how, and what a mechanism says about itself."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from attention_laws import (
    LAYOUT,
    LAYOUTS,
    SPECS,
    accepted,
    attend,
    draw,
    each,
    given_to,
    innermost,
    same,
    site_of,
)
from formulas.mhla import started
from formulas.nsa import small
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mitaswap import Spec, TokenLayout, mechanism
from mitaswap.errors import MitaswapError
from mitaswap.mechanisms import (
    MECHANISMS,
    TRAITS,
    WRAPPERS,
    Mechanism,
    SiteShape,
    learned_numbers,
)
from mitaswap.mechanisms.nsa import NsaOptions
from mitaswap.studies._groups import GROUPS

# ------------------------------------------------------------------------------------------- errors


SMALL = TokenLayout(1, (3, 5))


@dataclass(frozen=True)
class Bad:
    """A call that must be refused, and what the error says."""

    spec: str
    message: str
    layout: TokenLayout = SMALL

    def __str__(self) -> str:
        return self.spec


AT = "(tokens 1 + 3x5)"
BAD_SIZES = [
    Bad("mita(m=16,k=4)", f"m=16 must be between 1 and the 15 patches {AT}; use m=15"),
    Bad("mita(m=0,k=4)", f"m=0 must be between 1 and the 15 patches {AT}; use m=1"),
    Bad("mita(m=6,k=17)", f"k=17 must be between 1 and the 16 tokens {AT}; use k=16"),
    Bad("mita(m=6,k=0)", f"k=0 must be between 1 and the 16 tokens {AT}; use k=1"),
    Bad("mita(m=6,k=-3)", f"k=-3 must be between 1 and the 16 tokens {AT}; use k=1"),
    Bad("mita(m=6,k=4,s=7)", f"s=7 must be between 1 and the 6 experts (m) {AT}; use s=6"),
    Bad("mita(m=6,k=4,s=0)", f"s=0 must be between 1 and the 6 experts (m) {AT}; use s=1"),
    Bad("mita(m=7,k=4)", "7 landmarks do not fit a 3x5 grid as a x b windows; the nearest count"),
    Bad("mita(m=6,k=4,pool=3x3)", "pool=3x3 must be 'auto' or AxB with A * B = 6; use pool=2x3"),
    Bad("mita(m=6,k=4,pool=big)", "pool=big must be 'auto' or AxB with A * B = 6; use pool=2x3"),
    Bad(
        "mita(m=6,k=4,pool=6x1)", "pool=6x1 has more windows than the 3x5 grid has rows or columns"
    ),
    Bad("agent", f"agent(n=49): n=49 must be between 1 and the 15 patches {AT}; use n=15"),
    Bad("agent(n=0)", f"n=0 must be between 1 and the 15 patches {AT}; use n=1"),
    Bad("agent(n=13)", "13 landmarks do not fit a 3x5 grid as a x b windows; the nearest count"),
    Bad("agent(n=4,pool=4x1)", "pool=4x1 has more windows than the 3x5 grid has rows or columns"),
    *(
        Bad(
            f"{name}={n})", f"{n} windows do not fit a 3x5 grid as a x b windows; the nearest count"
        )
        for name, n in {
            "bra(k=1,n": 7,
            "moba(blocks=windows,k=1,n": 7,
            "mhla(m": 7,
            "linformer(n": 7,
            "sparsifiner(k=4,coefficients=2,n": 7,
        }.items()
    ),
    Bad("bra(k=1,n=6,pool=3x1)", "pool=3x1 must be 'auto' or AxB with A * B = 6; use pool=2x3"),
    # n=1 would be too few for the 8 coefficients, and 7 windows do not fit
    Bad("sparsifiner(k=4,n=0)", f"n=0 must be between 1 and the 15 patches {AT}; use n=8"),
    Bad("moba(n=0,k=3)", f"n=0 must be between 1 and the 15 patches {AT}; use n=3"),
    Bad("moba(n=0,k=7)", f"n=0 must be between 1 and the 15 patches {AT}; use n=7"),
    Bad("bra(n=0,k=7)", f"n=0 must be between 1 and the 15 patches {AT}; use n=8"),
    Bad(
        "bra(n=7,k=7)",
        "7 windows do not fit a 3x5 grid as a x b windows; the nearest count that does is 8",
    ),
    Bad("moba(n=4,k=2,pool=2x2)", "pool=2x2 is a shape of windows; use pool=auto, or blocks=wind"),
    Bad("deformable(points=16)", f"points=16 must be between 1 and the 15 patches {AT}; use poin"),
    Bad(
        "sparsifiner(k=4,n=6,coefficients=2,channels=-1)",
        "channels=-1 must be 0 or more; use channels=0",
    ),
    Bad(
        "sparsifiner(k=4,n=6,coefficients=2,threshold=-0.5)",
        "threshold=-0.5 must be 0 or more; use threshold=0",
    ),
    Bad(
        "sparsifiner(k=4,n=6,coefficients=2,coefficient_threshold=-0.5)",
        "coefficient_threshold=-0.5 must be 0 or more; use coefficient_threshold=0",
    ),
    Bad(
        "sparsifiner(k=17,n=6,coefficients=2,special=inside)",
        f"k=17 must be between 1 and the 16 tokens, and no fewer than the special ones, which it "
        f"counts {AT}; use k=16",
    ),
    Bad(
        "sparsifiner(k=2,n=6,coefficients=2,special=inside)",
        "k=2 must be between 3 and the 18 tokens, and no fewer than the special ones, which it "
        "counts (tokens 1 + 3x5 + 2); use k=3",
        TokenLayout(1, (3, 5), suffix=2),
    ),
    *(
        Bad(f"{name}(eps=-1.0)", "eps=-1.0 must be 0 or more; use eps=0")
        for name in ("linear", "focused", "performer", "polaformer")
    ),
    Bad("mhla(m=6,eps=-1.0)", "eps=-1.0 must be 0 or more; use eps=0"),
    Bad("ttt(eta=-1.0)", "eta=-1.0 must be 0 or more; use eta=0"),
    Bad("vit3(lr=-1.0)", "lr=-1.0 must be 0 or more; use lr=0"),
    Bad("inline(t=-1.0)", "t=-1.0 must be 0 or more; use t=0"),
    Bad("focused(floor=-0.5)", "floor=-0.5 must be 0 or more; use floor=0"),
    Bad(
        small("block=2,k=2"),
        "k=2 must be between 3 and the 16 blocks, and no fewer than first + local, which it counts "
        "(tokens 1 + 8x7); use k=3",
        LAYOUT,
    ),
    Bad(
        small("block=2,k=17"),
        "k=17 must be between 3 and the 16 blocks, and no fewer than first + local, which it "
        "counts (tokens 1 + 8x7); use k=16",
        LAYOUT,
    ),
    Bad(
        small("block=2,k=4,local=7"),
        f"local=7 must be between 0 and the 6 blocks {AT}; use local=3",
    ),
    Bad(
        small("block=2,k=4,local=200"),
        f"local=200 must be between 0 and the 6 blocks {AT}; use local=3",
    ),
    Bad(
        small("block=2,k=4,local=-1"),
        f"local=-1 must be between 0 and the 6 blocks {AT}; use local=0",
    ),
    Bad(
        small("block=2,k=4,first=5"),
        f"first=5 must be between 0 and the 4 blocks beside the local ones {AT}; use first=2",
    ),
    *(
        Bad(
            small(f"block={block}"),
            f"block={block} must be between 1 and the 6 patches a side that leave 6 blocks "
            "(tokens 1 + 14x14); use block=6",
            TokenLayout(1, (14, 14)),
        )
        for block in (47, 100000)
    ),
    Bad(
        small("block=2,k=4,stride=5"),
        "stride=5 must be between 1 and the 3 patches of a span, or some are in none; use stride=3",
    ),
    Bad(
        small("block=2,k=4,span=0"),
        f"span=0 must be between 1 and the 5 patches a side {AT}; use span=2",
    ),
    Bad(
        small("block=2,k=4,span=9"),
        f"span=9 must be between 1 and the 5 patches a side {AT}; use span=5",
    ),
    Bad(
        small("block=2,k=4,blocks=raster,span=7"),
        f"span=7 must be between 1 and the 4 patches a side {AT}; use span=4",
    ),
    Bad(
        small("block=9,k=1,first=0,local=1"),
        f"block=9 must be between 1 and the 5 patches a side that leave 1 block {AT}; use block=5",
    ),
    Bad(
        small("block=9,k=1,first=0,local=1,blocks=raster"),
        f"block=9 must be between 1 and the 4 patches a side that leave 1 block {AT}; use block=4",
    ),
    *(
        Bad(
            f"{spec}=100001)",
            f"{option}=100001 must be at most 33, as 9 reach from one end of 5 places to the "
            f"other; use {option}=33",
        )
        for spec, option in (
            ("dat(kernel", "kernel"),
            ("polaformer(conv", "conv"),
            ("linear+dwc(kernel", "kernel"),
        )
    ),
    Bad(
        "nystrom(m=4,conv=100001)",
        "conv=100001 must be at most 33, as 31 reach from one end of 16 places to the other; use "
        "conv=33",
    ),
    Bad(
        "dsa(k=4,rope=true,index_dim=7)",
        "index_dim=7 must be 8 or more, as rope turns pairs of half of it; use index_dim=8",
    ),
    Bad(
        "polaformer(conv=-1)",
        "conv=-1 must be 0 or more, which leaves out the convolution; use conv=0",
    ),
    Bad(
        "polaformer(conv=4)",
        "conv=4 must be odd, or the convolution is not centred; use conv=5, or conv=0 to leave it "
        "out",
    ),
    Bad(
        "nystrom(m=4,conv=-1)",
        "conv=-1 must be 0 or more, which leaves out the convolution; use conv=0",
    ),
    Bad(
        "nystrom(m=4,conv=34)",
        "conv=34 must be odd, or the convolution is not centred; use conv=33, or conv=0 to leave "
        "it out",
    ),
    Bad(
        "linear+dwc(share=true,kernel=2)",
        "kernel=2 must be odd and at least 1, or the convolution is not centred; use kernel=3",
    ),
    Bad(
        "ttt(batch=0,positions=true)",
        "positions=true learns a factor for each position of a mini-batch; with batch=0 their "
        "number would follow the image; use batch=16",
    ),
    # sizes and factors beyond which memory or sums overflow, also of options that are not in use
    Bad(
        "performer(features=1000000000)",
        "features=1000000000 must be between 0 and the 512 features, 64 for each of the head's "
        "channels or one for each token; use features=512",
    ),
    Bad(
        f"performer(seed={10**24})",
        f"seed={10**24} must be between 0 and the 9223372036854775807 that a generator takes; use "
        "seed=9223372036854775807",
    ),
    Bad("reformer(chunk=4,seed=-1)", "seed=-1 must be between 0 and the 9223372036854775807 that"),
    Bad(
        "reformer(chunk=4,buckets=1000000000)",
        f"buckets=1000000000 must be between 0 and the 32 buckets, two for each token {AT}; use "
        "buckets=32",
    ),
    Bad("reformer(chunk=4,buckets=3)", "buckets=3 must be even (each rotation gives two), or 0 fo"),
    Bad(
        "sparsifiner(k=4,n=6,coefficients=2,channels=1000000000)",
        "channels=1000000000 must be at most 128, or as many as a head has; use channels=128",
    ),
    Bad(
        "sparsifiner(k=4,n=6,coefficients=2,threshold=1e9)",
        "threshold=1000000000.0 must be at most 1, as weights sum to one; use threshold=1",
    ),
    Bad("polaformer(alpha=1e300)", "alpha=1e+300 must be at most 16, or powers overflow; use alph"),
    Bad(
        "inline(t=1e300)", "t=1e+300 must be at most 30.0, where exponents are cut off; use t=30.0"
    ),
    Bad("ttt(eta=1e300)", "eta=1e+300 must be at most 100, or inner steps overflow; use eta=100"),
    Bad("vit3(lr=1e300)", "lr=1e+300 must be at most 10000, or outputs overflow; use lr=10000"),
    Bad("linear(eps=1e300)", "eps=1e+300 must be at most 1000000; use eps=1000000"),
    Bad(
        "pvt(size=-5)",
        "size=-5 must be between 1 and the 7 patches along the grid's longer side, or 7 on smaller "
        f"grids {AT}; use size=1",
    ),
    Bad(
        "pvt(reduction=pool,size=999)",
        "size=999 must be between 1 and the 14 patches along the grid's longer side, or 7 on "
        "smaller grids (tokens 1 + 14x14); use size=14",
        TokenLayout(1, (14, 14)),
    ),
    Bad(
        "pvt(reduction=pool,r=-5)",
        f"r=-5 must be between 1 and the 3 patches along the grid's smaller side {AT}; use r=1",
    ),
    Bad(
        "standard+window(size=1000001)",
        "size=1000001 must be at most 33, as 9 reach from one end of 5 places to the other; use "
        "size=33",
    ),
    Bad("standard+window(size=4)", "size=4 must be odd, with the query in its middle; use size=5"),
    Bad(
        "vit3(conv=all,rope=true)",
        "rope=true turns queries and keys of heads with a gated unit, and conv=all leaves none; "
        "use rope=false, or conv=last, none or extra",
    ),
]


@pytest.mark.parametrize("bad", BAD_SIZES, ids=str)
def test_impossible_sizes(bad: Bad) -> None:
    part = mechanism(bad.spec)
    with pytest.raises(MitaswapError) as from_check:
        part.check(bad.layout, 8)
    text = str(from_check.value)
    # whose options they are stands in front
    assert text.startswith(f"{part.spec}: {bad.message.removeprefix(f'{part.spec}: ')}")
    assert "use " in text or "nearest" in text
    with pytest.raises(MitaswapError) as from_call:  # before any work: meta tensors have no data
        part(*(x.to("meta") for x in draw(bad.layout)), layout=bad.layout)
    told, _, fits = str(from_call.value).partition(f"; for {bad.layout} there is ")
    assert told == text
    if fits:
        mechanism(fits).check(bad.layout, 8)


#: numbers far from any size, and a few between
NUMBERS: dict[str, tuple[int | float, ...]] = {
    "int": (-7, 0, 2, 11, 47, 200, 100_000, 10**9, 10**24 - 1),
    "float": (-1.0, math.nan, math.inf, 1e300, 10**24 - 1, 10**400),
}


def run_with(name: str, options: dict[str, Any], layout: TokenLayout) -> None:
    """What is accepted also works: a finite output. What is not accepted is an error."""
    part = mechanism(Spec(name, options))
    part.check_site(SiteShape(3, 24, layout))
    with torch.no_grad():
        out = attend(part, *draw(layout, batch=1, dim=24, dtype=torch.float32), layout)
    assert out.isfinite().all(), part.spec


@pytest.mark.parametrize("name", MECHANISMS.names())
@pytest.mark.parametrize("layout", [TokenLayout(1, (14, 14)), TokenLayout(5, (5, 9))], ids=str)
def test_one_wrong_number_is_one_error_whose_advice_is_legal(
    name: str, layout: TokenLayout
) -> None:
    cls = MECHANISMS.get(name)
    for field in fields(cls.options_type):
        for wrong in NUMBERS.get(str(field.type), ()):
            options = {**cls.suggest(layout), field.name: wrong}
            try:
                run_with(name, options, layout)
            except MitaswapError as error:
                advice = re.search(r"; use (\w+)=([^\s,;]+)", str(error))
                nearest = re.search(r"the nearest count that does is (\d+)", str(error))
                assert advice or nearest, error
                option, value = advice.groups() if advice else (field.name, nearest[1])
                options[option] = type(getattr(cls.options_type(), option))(value)
                run_with(name, options, layout)


#: what no option allows, whatever the others say
NEVER = {"int": (-7, 10**9), "float": (-1.0, math.nan, 1e300)}


@each
def test_wrong_numbers_are_refused_beside_any_options(spec: str) -> None:
    """Also those of options that others leave unused."""
    asked = Spec.parse(spec)
    layout = accepted(spec)[0]
    kinds = [(MECHANISMS.get(asked.name), 0)]
    kinds += [(WRAPPERS.get(outer.name), i) for i, outer in enumerate(asked.wrappers, 1)]
    for kind, place in kinds:
        for field in fields(kind.options_type):
            for wrong in NEVER.get(str(field.type), ()):
                if field.name == "seed" and wrong == 10**9:
                    continue
                parts = [Spec(asked.name, asked.options), *asked.wrappers]
                parts[place] = parts[place].with_options(**{field.name: wrong})
                part = mechanism(Spec(asked.name, parts[0].options, tuple(parts[1:])))
                with pytest.raises(MitaswapError, match=f"{field.name}="):
                    part.check_site(SiteShape(3, 24, layout))


@pytest.mark.parametrize("behind", ["", "+gate", "+dwc+prefix"])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dat(groups=4)", "groups=4 must divide the 6 heads; use groups=3"),
        ("inline", "50 channels are no multiple of 6 heads; use local=false"),
        ("linformer(n=11)", "the nearest count that does is"),
    ],
)
def test_a_site_can_be_asked_about_before_any_work(
    monkeypatch: pytest.MonkeyPatch, spec: str, message: str, behind: str
) -> None:
    part, site = mechanism(spec + behind), SiteShape(6, 8, LAYOUT, width=50)
    with pytest.raises(MitaswapError) as asked:
        part.check_site(site)
    assert message in str(asked.value)
    monkeypatch.setattr(type(innermost(part)), "build", lambda *_: pytest.fail("work was done"))
    with pytest.raises(MitaswapError) as error:
        part.attach(site)
    assert str(error.value) == str(asked.value)


@pytest.mark.parametrize("grid", [(4, 13), (3, 17), (13, 4), (2, 6)], ids=str)
@pytest.mark.parametrize(
    "spec", ["sparsifiner(k=9)", "linformer(n=49)", "agent(bias=true)", "agent(bias=true,pool=7x7)"]
)
def test_windows_of_the_start_bind_no_later_grid(spec: str, grid: tuple[int, int]) -> None:
    """Learned parts follow the image size, also where windows that they start from do not fit."""
    part, layout = mechanism(spec), TokenLayout(1, grid)
    with pytest.raises(MitaswapError):
        mechanism(spec).check(layout, 8)
    part.attach(SiteShape(3, 8, TokenLayout(1, (14, 14))))
    assert attend(part.double(), *draw(layout), layout).isfinite().all()


def test_special_tokens_inside_the_tables_keep_their_number() -> None:
    part = mechanism("sparsifiner(n=6,k=6,coefficients=4,special=inside)")
    part.attach(SiteShape(3, 8, TokenLayout(1, (4, 7))))
    part.check(TokenLayout(1, (3, 5)), 8)
    with pytest.raises(MitaswapError) as error:
        part.check(TokenLayout(1, (3, 5), suffix=1), 8)
    assert str(error.value) == (
        f"{part.spec} was built for 1 special tokens, which special=inside makes part of its "
        "tables, not for 2 (tokens 1 + 3x5 + 1); use special=apart"
    )


STARTS = ("paper", "released", "linear", "exp", "gaussian", "local", "uniform")


@pytest.mark.parametrize("pool", [(2, 3), (3, 3), (1, 4)])
@pytest.mark.parametrize("start", STARTS)
def test_starts_of_mhla(start: str, pool: tuple[int, int]) -> None:
    part = mechanism(f"mhla(m={pool[0] * pool[1]},pool={pool[0]}x{pool[1]},start={start})")
    part.attach(SiteShape(3, 8, LAYOUT))
    mixing = part.get_parameter("mixing").detach()
    gaps = {kind: float((mixing - started(kind, pool)).abs().max()) for kind in STARTS}
    assert [kind for kind, gap in gaps.items() if gap < 1e-6] == [start]


@pytest.mark.parametrize(
    ("option", "most"), [("index_heads", 64), ("index_dim", 128)], ids=["heads", "width"]
)
def test_an_indexer_is_no_larger_than_the_papers_or_the_site(option: str, most: int) -> None:
    part = mechanism(f"dsa(k=4,{option}=100000000)")
    with pytest.raises(MitaswapError, match=f"{option}=100000000 .*; use {option}={most}"):
        part.attach(SiteShape(6, 8, LAYOUT))
    larger = SiteShape(72, 8, LAYOUT)
    with pytest.raises(MitaswapError, match=f"use {option}={72 if most == 64 else 576}"):
        part.check_site(larger)


@pytest.mark.parametrize(("groups", "near"), [(5, 6), (4, 3), (9, 6)])
def test_groups_that_do_not_divide_the_heads(groups: int, near: int) -> None:
    with pytest.raises(MitaswapError) as error:
        mechanism(f"dat(groups={groups})").attach(SiteShape(6, 8, LAYOUT))
    assert str(error.value).endswith(f"groups={groups} must divide the 6 heads; use groups={near}")


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_no_mechanism(group: str) -> None:
    with pytest.raises(
        MitaswapError, match=f"'{group}' is a group of mechanisms, for `mitaswap ev"
    ):
        mechanism(group)


@pytest.mark.parametrize("given", WRAPPERS.names())
def test_a_wrapper_alone(given: str) -> None:
    with pytest.raises(MitaswapError) as error:
        mechanism(given)
    assert str(error.value) == (
        f"{given} is a wrapper: write it behind a mechanism, for instance 'mita(m=25,k=25)+{given}'"
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mitta(m=4)", "unknown mechanism 'mitta'. Did you mean 'mita'? Allowed: agent, "),
        ("softmax9", "unknown mechanism 'softmax9'. Allowed: agent, "),
        (
            "mita(mm=4)",
            "unknown option of mita 'mm'. Did you mean 'm'? Allowed: impl, k, landmark_",
        ),
        ("standard(m=4)", "unknown option of standard 'm'. Allowed: impl."),
        ("mita(m=four)", "m='four' in 'mita(m=four)' must be of type int"),
        ("mita(m=4.0)", "m=4.0 in 'mita(m=4.0)' must be of type int"),
        ("mita(m=true)", "m=True in 'mita(m=true)' must be of type int"),
        ("mita(k=none)", "k=None in 'mita(k=none)' must be of type int"),
        ("mita(pool=4)", "pool=4 in 'mita(pool=4)' must be of type str"),
        ("linear(eps=small)", "eps='small' in 'linear(eps=small)' must be of type float"),
        ("linear(eps=true)", "eps=True in 'linear(eps=true)' must be of type float"),
        (
            "linear(feature=rely)",
            "unknown value of feature in 'linear(feature=rely)': 'rely'. Did you mean 'relu'? "
            "Allowed: elu, relu, softmax.",
        ),
        (
            "mita(variant=route)",
            "unknown value of variant in 'mita(variant=route)': 'route'. "
            "Did you mean 'route-only'? Allowed: compress-only, full, route-only.",
        ),
        (
            "focused(eps_of=mode)",
            "unknown value of eps_of in 'focused(eps_of=mode)': 'mode'. Did you mean 'mean'? "
            "Allowed: mean, sum.",
        ),
        (
            "sparsifiner(mask_scale=head)",
            "unknown value of mask_scale in 'sparsifiner(mask_scale=head)': 'head'. Did you mean "
            "'heads'? Allowed: heads, site.",
        ),
        (
            "sparsifiner(special=insid)",
            "unknown value of special in 'sparsifiner(special=insid)': 'insid'. Did you mean "
            "'inside'? Allowed: apart, inside.",
        ),
        (
            "mhla(start=expo)",
            "unknown value of start in 'mhla(start=expo)': 'expo'. Did you mean 'exp'? Allowed: "
            "exp, gaussian, linear, local, paper, released, uniform.",
        ),
        ("linear+dwc(share=2)", "share=2 in 'dwc(share=2)' must be of type bool"),
        (
            "agent(impl=triton)",
            "unknown value of impl in 'agent(impl=triton)': 'triton'. "
            "Allowed: auto, fused, reference.",
        ),
    ],
)
def test_unknown_names_and_wrong_types(spec: str, message: str) -> None:
    with pytest.raises(MitaswapError) as error:
        mechanism(spec)
    assert str(error.value).startswith(message)


def test_whole_numbers_are_floats_too() -> None:
    eps = mechanism("linear(eps=1)").options.eps
    assert eps == 1.0 and isinstance(eps, float)


@each
def test_shapes_that_do_not_fit(spec: str) -> None:
    part = mechanism(spec)
    q, k, v = draw()
    for wrong, shapes in {
        (q[0], k[0], v[0]): "[3, 57, 8], [3, 57, 8], [3, 57, 8]",
        (q, k[:, :, 1:], v[:, :, 1:]): "[2, 3, 57, 8], [2, 3, 56, 8], [2, 3, 56, 8]",
        (q, k[:, :1], v[:, :1]): "[2, 3, 57, 8], [2, 1, 57, 8], [2, 1, 57, 8]",
        (q, k, v[:, :, 1:]): "[2, 3, 57, 8], [2, 3, 57, 8], [2, 3, 56, 8]",
    }.items():
        with pytest.raises(MitaswapError) as error:
            part(*wrong, layout=LAYOUT)
        assert str(error.value) == (
            f"q, k, v must be [B, H, N, D] of one shape (v may have its own D), got {shapes}"
        )
    with pytest.raises(MitaswapError) as error:
        part(q, k, v, layout=TokenLayout(0, (8, 7)))
    assert str(error.value).startswith("q has 57 tokens, but its layout is 0 + 8x7 = 56 tokens.")


@each
@pytest.mark.parametrize(
    ("part", "extra"),
    [
        ("bias", {"attn_mask": torch.zeros(57, 57)}),
        ("causal", {"is_causal": True}),
        ("dropout", {"dropout_p": 0.1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_extras_are_honoured_or_refused(spec: str, part: str, extra: dict[str, Any]) -> None:
    mech = mechanism(spec)
    q, k, v = draw(dtype=torch.float32)
    if part in mech.supports:
        assert attend(mech, q, k, v, **extra).shape == v.shape
        return
    with pytest.raises(MitaswapError) as error:
        mech(q, k, v, layout=LAYOUT, **extra)
    (name,) = extra
    assert str(error.value) == (
        f"{mech.spec} cannot honour {name}; only mechanisms that support it can"
    )


@each
def test_unknown_extras(spec: str) -> None:
    q, k, v = draw()
    with pytest.raises(MitaswapError) as error:
        mechanism(spec)(q, k, v, layout=LAYOUT, attn_mas=None)
    assert str(error.value) == (
        "unknown argument of an attention call 'attn_mas'. Did you mean 'attn_mask'? "
        "Allowed: attn_mask, dropout_p, is_causal, project, x."
    )


@each
def test_implementations(spec: str) -> None:
    """auto is one of the two; fused is the kernel or an error, never a silent fallback."""
    q, k, v = draw(dtype=torch.float32)
    plain = mechanism(spec)
    reference = mechanism(plain.spec.with_options(impl="reference"))
    same(attend(plain, q, k, v), attend(reference, q, k, v), 1e-5)
    if (
        type(innermost(plain)).fused is Mechanism.fused
    ):  # before any work, not in the middle of a run
        with pytest.raises(MitaswapError) as error:
            mechanism(plain.spec.with_options(impl="fused"))
        assert str(error.value) == (
            f"{innermost(plain).name} has no fused kernel; use impl=reference or impl=auto"
        )


def test_a_mechanism_with_a_kernel_is_built_fused() -> None:
    class Kernel(MECHANISMS.get("standard")):  # type: ignore[misc]
        def fused(self, q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.zeros_like(q)

    q, k, v = draw()
    part = Kernel(Kernel.options_type(impl="fused"))
    assert part(q, k, v, layout=LAYOUT).abs().max() == 0


@pytest.mark.parametrize("norm", ["true", "false"])
def test_bare_averages_learn_nothing(norm: str) -> None:
    assert learned_numbers(mechanism(f"pvt(reduction=pool,size=8,norm={norm})")) == 0
    assert learned_numbers(mechanism(f"pvt(reduction=pool-conv,norm={norm})")) > 0


# ----------------------------------------------------------------------------------------- the card


#: columns of the results (timm's own names among them): an option of that name would hide one
COLUMNS = {
    "model", "data", "split", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size",
    "crop_pct", "interpolation", "layer", "head", "metric", "value", "mechanism", "trained_with",
    "run_with", "seed", "device", "dtype", "commit", "samples", "study", "n_images", "batch_size",
    "loss", "recipe", "source", "version", "stat",
}  # fmt: skip


@pytest.mark.parametrize("name", MECHANISMS.names())
def test_card_and_options_are_complete(name: str) -> None:
    cls = MECHANISMS.get(name)
    assert cls.name == name and cls.__doc__
    for field in fields(cls.card):
        text = getattr(cls.card, field.name)
        assert isinstance(text, str) and text.strip() == text != "", field.name
    options = {field.name: field for field in fields(cls.options_type)}
    assert not options.keys() & COLUMNS - {"seed"}, "a column of the results has that name"
    assert not mechanism(name).settings.keys() & COLUMNS
    assert cls.options_type.__doc__ and "Args:" in cls.options_type.__doc__
    documented = cls.options_type.__doc__ + (cls.options_type.__mro__[1].__doc__ or "")
    for option in options:
        assert f"{option}:" in documented, f"{option} is not in the docstring of the options"
    assert {option for _, option in cls.axes} <= options.keys()
    assert cls.supports <= {"bias", "causal", "dropout"}
    assert cls.card.untrained in ("usable", "needs finetuning")
    for sample in cls.samples:
        assert sample.keys() <= options.keys()
        part = mechanism(Spec(name, sample))
        part.check(LAYOUT, 8)
        assert part.traits <= TRAITS.keys() and part.needs <= {"grid", "x", "project"}
        assert "project" not in part.needs or "x" in part.needs


GRIDS = [TokenLayout(1, grid) for grid in
         [(4, 4), (4, 7), (5, 5), (6, 6), (7, 7), (8, 8), (9, 11), (12, 12), (13, 13), (16, 16),
          (14, 20), (24, 24), (32, 32), (37, 37)]]  # fmt: skip


@pytest.mark.parametrize("name", MECHANISMS.names())
def test_defaults_fit_or_a_fitting_set_is_suggested(name: str) -> None:
    """Those of papers on texts fit 64 x 64 patches; where they do not, the error has what does."""
    cls = MECHANISMS.get(name)
    assert not cls.suggest(TokenLayout(1, (64, 64)))
    mechanism(name).check(TokenLayout(1, (64, 64)), 64)
    for layout in GRIDS:
        fits = mechanism(Spec(name, cls.suggest(layout)))
        fits.check(layout, 16)
        try:
            mechanism(name).check(layout, 16)
        except MitaswapError as error:
            with pytest.raises(MitaswapError) as told:
                mechanism(name).fit(layout, 16)
            assert str(told.value) == f"{error}; for {layout} there is {fits.spec}"


def test_what_fits_keeps_what_was_chosen_and_what_is_around() -> None:
    layout = TokenLayout(1, (14, 14))
    for spec, fits in {
        "dsa(index_dim=64)+dwc+gate": "dsa(k=50,index_dim=64)+dwc+gate",
        "nsa(first=0,local=1)": "nsa(block=4,k=6,window=5,blocks=windows,span=3,stride=2,first=0,"
        "local=1)",
    }.items():
        for ask in (mechanism(spec).fit, lambda a, d, s=spec: mechanism(s).attach(
            SiteShape(3, d, a))):  # fmt: skip
            with pytest.raises(MitaswapError) as error:
                ask(layout, 64)
            assert str(error.value).endswith(f"; for {layout} there is {fits}")
        mechanism(fits).check_site(SiteShape(3, 64, layout))
    for spec in ("spark+dwc(kernel=4)", "spark(k=198)", "nsa(window=4)"):
        with pytest.raises(MitaswapError) as error:  # others are to blame
            mechanism(spec).fit(layout, 64)
        assert "there is" not in str(error.value)


@pytest.mark.parametrize("side", [14, 16, 24, 32, 33, 45, 48])
def test_suggested_sizes_read_less_than_half_of_the_tokens(side: int) -> None:
    layout = TokenLayout(1, (side, side))
    for name, option in {"spark": "k", "dsa": "k", "linformer": "n"}.items():
        options = mechanism(Spec(name, MECHANISMS.get(name).suggest(layout))).options
        assert 2 * getattr(options, option) <= layout.tokens
    o = mechanism(Spec("nsa", MECHANISMS.get("nsa").suggest(layout))).options
    assert isinstance(o, NsaOptions)
    read = o.k * o.block**2 + o.window**2 + layout.patches // o.stride**2
    assert read < layout.patches and (side < 24 or 2 * read <= layout.patches)


@each
def test_cost_is_what_a_counter_sees(spec: str) -> None:
    """FLOPs by the formula (and the slots that its blocks waste) against those of one forward."""
    for layout in accepted(spec, [*LAYOUTS, TokenLayout(1, (14, 14)), TokenLayout(0, (16, 24))]):
        part = mechanism(spec)
        q, k, v = draw(layout, batch=1, dim=16, dtype=torch.float32)
        attend(part, q, k, v, layout)  # attaches
        # by plain products: not every version of the counter knows torch's fused attention
        counted = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counted, torch.no_grad():
            attend(part, q, k, v, layout)
        cost = part.cost(site_of(part, layout, dim=16))
        assert cost.flops + cost.padding == pytest.approx(counted.get_total_flops(), rel=0.01)
        assert cost.bytes() == 2 * cost.moved >= 2 * 4 * q.numel()


@each
def test_no_fewer_flops_for_more_tokens(spec: str) -> None:
    part = mechanism(spec)
    layouts = accepted(spec, [TokenLayout(1, (side, side)) for side in (7, 14, 28)])
    costs = [part.cost(site_of(part, layout, dim=16)) for layout in layouts]
    assert [c.flops for c in costs] == sorted({c.flops for c in costs})


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "x" in mechanism(spec).needs])
def test_x_is_asked_for(spec: str) -> None:
    part = mechanism(spec)
    q, k, v = draw()
    for wrong, text in ((None, "none"), (torch.zeros(2, 5, 24), "[2, 5, 24]")):
        extra = {} if wrong is None else {"x": wrong}
        with pytest.raises(MitaswapError) as error:
            part(q, k, v, layout=LAYOUT, **extra)
        assert str(error.value) == (
            f"{part.spec} needs the attention module's input x, [B, N, C] = [2, 57, C], "
            f"got {text}; call it with x=..., or swap it into a model, which hands x over"
        )


@pytest.mark.parametrize("spec", [s for s in SPECS if "project" in mechanism(s).needs])
def test_projections_are_asked_for(spec: str) -> None:
    part = mechanism(spec)
    q, k, v = draw()
    x = given_to(part, q, k, v)["x"]
    for wrong, text in (({}, "none"), ({"project": None}, "NoneType"), ({"project": x}, "Tensor")):
        with pytest.raises(MitaswapError) as error:
            part(q, k, v, layout=LAYOUT, x=x, **wrong)
        use = part.spec.with_options(**part.unprojected)
        assert str(error.value) == (
            f"{part.spec} needs the attention module's key and value projections, project(rows "
            f"[B, M, C]) -> keys, values [B, H, M, D], got {text}; call it with project=..., or "
            f"swap it into a model, which hands them over, or use {use}"
        )
        assert mechanism(use)(q, k, v, layout=LAYOUT).shape == v.shape
    assert part.site is None


def test_what_needs_projections_names_options_that_do_not() -> None:
    for name, cls in MECHANISMS.items():
        for sample in cls.samples:
            part = mechanism(Spec(name, sample))
            other = mechanism(part.spec.with_options(**part.unprojected))
            assert "project" not in other.needs
    assert str(mechanism("pvt+gate").unprojected) == "{'place': 'after'}"


@pytest.mark.parametrize("mix", ["width", "head"])
@pytest.mark.parametrize("reduction", ["conv", "pool-conv", "pool"])
def test_groups_of_the_input_are_asked_for(reduction: str, mix: str) -> None:
    part = mechanism(f"pvt(reduction={reduction},mix={mix})")
    site = SiteShape(3, 8, TokenLayout(1, (14, 14)), width=50)
    if (reduction, mix) in (("conv", "head"), ("pool-conv", "head")):
        with pytest.raises(MitaswapError) as error:
            part.check_site(site)
        assert str(error.value) == (
            f"{part.spec} cuts the input's channels into one group per head, and 50 channels are "
            "no multiple of 3 heads; use mix=width"
        )
        part = mechanism(part.spec.with_options(mix="width"))
    part.attach(site)


@each
def test_spec_shows_what_is_set(spec: str) -> None:
    """The spec names what is not a default, and the axes always; it builds the same mechanism."""
    part = mechanism(spec)
    shown = part.spec.options
    assert mechanism(str(part.spec)).settings == part.settings
    part = innermost(part)
    assert {option for _, option in part.axes} <= shown.keys()
    for field in fields(part.options):
        value = getattr(part.options, field.name)
        assert shown.get(field.name, field.default) == value


def test_defaults_are_the_papers() -> None:
    assert str(mechanism("mita").spec) == "mita(m=25,k=25)"
    assert str(mechanism("agent").spec) == "agent(n=49)"
    assert str(mechanism("moba(own=true)").spec) == "moba(n=16)"
    assert str(mechanism("reformer(share_qk=true,chunk=8)").spec) == "reformer(buckets=0,chunk=8)"
    assert str(mechanism("pvt(norm=true,place=before)").spec) == "pvt"
    assert str(mechanism("nystrom(conv=33)").spec) == "nystrom(m=64)"
    assert str(mechanism("nsa(first=1,local=2,projections=branch)").spec) == "nsa"
    sizes = "nsa(block=8,k=16,span=6,stride=4,window=23,blocks=raster)"  # 64, 16, 32, 16, 512
    assert str(mechanism(sizes).spec) == "nsa"
    assert str(mechanism("ttt(step=sum)").spec) == "ttt"
    assert str(mechanism("dat(groups=0,stride=2)").spec) == "dat"
    assert str(mechanism("dsa(k=2048,index_dim=128)").spec) == "dsa(k=2048)"
    assert str(mechanism("linformer").spec) == "linformer(n=256)"
    assert str(mechanism("spark(r=0)").spec) == "spark(k=256)"
    assert str(mechanism("linear(eps=1e-6,feature=elu)").spec) == "linear"
    assert repr(mechanism("mita(k=9,m=4)")) == "Mita(mita(m=4,k=9))"
