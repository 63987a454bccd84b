"""Numbers: accuracy against a loop by hand, overlap against the paper's definition, images decoded
once, networks left as they were.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Gated, registered, snapshot
from torch import Tensor

import mitaswap
from mitaswap import evaluation
from mitaswap.checkpoint import KEY, open_network
from mitaswap.data import Decoded, open_set
from mitaswap.errors import MitaswapError
from mitaswap.evaluation import Images, Settings, measure
from mitaswap.mechanisms import MECHANISMS, Routing
from mitaswap.results import Run, load_rows
from mitaswap.spec import Recipe, Spec
from mitaswap.stats import STATISTICS
from mitaswap.stats.overlap import chance_table
from mitaswap.studies import Plan, Workbench, cells_of, open_run, run_cells
from mitaswap.surgery import swapped_sites
from mitaswap.tokens import TokenLayout

pytestmark = pytest.mark.usefixtures("one_thread")
MITA = "mita(m=9,k=9)"
DIGITS = Settings("digits", limit=40, device="cpu")


def rows_of(plan: Plan, directory: Path) -> list[dict[str, Any]]:
    """The rows of a plan, computed."""
    bench = Workbench(plan)
    with open_run(directory, plan.to_dict(), {}) as run:
        run_cells(cells_of(plan, bench), run)
    return [{str(k): v for k, v in row.items()} for row in load_rows(directory).to_dict("records")]


def plan_of(*folders: Path, settings: Settings = DIGITS, **options: Any) -> Plan:
    return Plan({folder.name: str(folder) for folder in folders}, settings, **options)


def by_hand(name: str | Path, mechanism: str | None, data: str = "digits") -> dict[str, float]:
    """Accuracy and loss, one image at a time, by the words of their definitions."""
    network = open_network(str(name), swapped=False)
    if mechanism:
        mitaswap.convert(network.module, mechanism)
    images = open_set(data, None, 40)
    first = among_five = loss = 0.0
    for image, label in images:
        x = network.preprocess.normalise(network.preprocess.to_uint8(image)[None])
        with torch.no_grad():
            scores = network.logits(x)[0].double()
        ranked = scores.sort(descending=True).indices.tolist()
        first += ranked[0] == label
        among_five += label in ranked[:5]
        loss -= float((scores[label].exp() / scores.exp().sum()).log())
    return {"top1": 100 * first / 40, "top5": 100 * among_five / 40, "loss": loss / 40}


# --- accuracy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["timm", "hf"])
@pytest.mark.parametrize("mechanism", [None, "mita(m=4,k=5)"], ids=["plain", "mita"])
def test_measure_equals_a_loop_by_hand(
    request: pytest.FixtureRequest, library: str, mechanism: str | None
) -> None:
    folder = request.getfixturevalue(f"{library}_dir")
    network = open_network(str(folder))
    if mechanism:
        mitaswap.convert(network.module, mechanism)
    seen: list[int] = []
    settings = replace(DIGITS, batch_size=16)
    found = measure(network, Images(settings).decoded(network), settings, seen.append)
    expected = by_hand(folder, mechanism)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert seen == [16, 16, 8]
    assert (found["images"], found["correct"]) == (40, round(expected["top1"] * 0.4))
    assert found["top1_err"] == pytest.approx(100 - expected["top1"])
    assert found["top1_low"] < found["top1"] < found["top1_high"]
    assert found["infer_samples_per_sec"] == pytest.approx(40 / found["seconds"])


def test_batch_size_changes_no_number(timm_dir: Path) -> None:
    found = [mitaswap.evaluate(timm_dir, "digits", limit=40, batch_size=n) for n in (1, 7, 64)]
    for name in ("top1", "top5", "loss"):
        assert [one[name] for one in found] == pytest.approx([found[0][name]] * 3, rel=1e-5)


def test_no_top5_of_four_classes() -> None:
    network = open_network("timm:test_vit(num_classes=4,img_size=32,pretrained=false)")
    black = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    decoded = Decoded(black, torch.tensor([0, 1, 2, 3]), 4, None, "black", "test")
    found = measure(network, decoded, DIGITS)
    # all images are the same: whatever class the network says, one of the four labels is it
    assert found["top5"] is None and found["correct"] == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtypes_are_those_of_the_forward(timm_dir: Path, dtype: str) -> None:
    network = open_network(str(timm_dir))
    seen: list[torch.dtype] = []
    network.module.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    found = mitaswap.evaluate(network, "digits", limit=40, dtype=dtype)
    assert set(seen) == {getattr(torch, dtype)}
    plain = mitaswap.evaluate(timm_dir, "digits", limit=40)
    assert found["loss"] == pytest.approx(plain["loss"], rel=0.05)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("dtype", "float23", "Did you mean 'float32'?"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("workers", -1, "workers must be at least 0, got -1"),
        ("device", "quantum", "unknown device 'quantum'"),
        ("device", "cuda:99", "device 'cuda:99' is not there"),
        ("device", "meta", "cannot compute on device 'meta'"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_impossible_settings(field: str, value: Any, says: str) -> None:
    with pytest.raises(MitaswapError) as error:
        replace(DIGITS, **{field: value})
    assert says in str(error.value) and "\n" not in str(error.value)


# --- mitaswap.evaluate ---------------------------------------------------------------------------


def test_evaluate_takes_names_directories_and_modules(timm_dir: Path, tmp_path: Path) -> None:
    model = mitaswap.convert(mitaswap.load(timm_dir), MITA)
    saved = mitaswap.save(model, tmp_path / "saved")
    expected = by_hand(timm_dir, MITA)
    for given in (saved, str(saved), model, open_network(str(saved))):
        found = mitaswap.evaluate(given, "digits", limit=40)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    with mitaswap.swap(mitaswap.load(timm_dir), MITA) as swapped:
        assert mitaswap.evaluate(swapped, "digits", limit=40)["loss"] == pytest.approx(
            expected["loss"], rel=1e-5
        )


def test_evaluate_leaves_a_module_as_it_was(timm_dir: Path) -> None:
    model = mitaswap.load(timm_dir).train()
    before, weights = snapshot(model), copy.deepcopy(model.state_dict())
    mitaswap.evaluate(model, "digits", limit=8, dtype="bfloat16")
    assert snapshot(model) == before and model.training
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_random_weights_come_from_the_seed(tiny: str) -> None:
    torch.manual_seed(1)
    first = mitaswap.evaluate(tiny, "digits", limit=8, seed=3)["loss"]
    state = torch.get_rng_state()
    assert mitaswap.evaluate(tiny, "digits", limit=8, seed=3)["loss"] == first
    assert mitaswap.evaluate(tiny, "digits", limit=8, seed=4)["loss"] != first
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own numbers go on undisturbed


# --- decoded once --------------------------------------------------------------------------------


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names the images that were decoded for an evaluation, one entry each."""
    from mitaswap.data.digits import Digits

    found: list[str] = []
    real = Digits._sample

    def sample(self: Digits, index: int) -> Any:
        found.append(f"image {index}")
        return real(self, index)

    monkeypatch.setattr(Digits, "_sample", sample)
    return found


def test_images_are_decoded_once_per_run(
    timm_dir: Path, tmp_path: Path, decodes: list[str]
) -> None:
    other = mitaswap.save(mitaswap.load(timm_dir), tmp_path / "other")
    run = (Spec("linear"), Spec.parse(MITA))
    plan = plan_of(timm_dir, other, run=run, grid={"K": (4, 9)}, stats=("overlap",))
    rows = rows_of(plan, tmp_path / "run")
    assert len({row["cell"] for row in rows}) == 2 * (3 + 2 + 1)
    assert len(decodes) == len(set(decodes)) == 40


def test_two_preprocessings_are_decoded_once_each(
    timm_dir: Path, hf_dir: Path, tmp_path: Path, decodes: list[str]
) -> None:
    rows = rows_of(plan_of(timm_dir, hf_dir, run=(Spec("linear"),)), tmp_path / "run")
    assert len(decodes) == 80 and len(set(decodes)) == 40
    for folder in (timm_dir, hf_dir):  # each network sees the pixels of its own config
        for row in rows:
            if row["model"] == folder.name:
                expected = by_hand(folder, row["run_with"])["loss"]
                assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_finished_run_decodes_nothing(timm_dir: Path, tmp_path: Path, decodes: list[str]) -> None:
    plan = plan_of(timm_dir, run=(Spec("linear"),))
    rows_of(plan, tmp_path / "run")
    first = (tmp_path / "run" / "rows.jsonl").read_bytes()
    decodes.clear()
    rows_of(plan, tmp_path / "run")
    assert (tmp_path / "run" / "rows.jsonl").read_bytes() == first
    assert decodes == []


# --- cells ---------------------------------------------------------------------------------------


def test_a_cell_leaves_the_network_as_it_was(timm_dir: Path, tmp_path: Path) -> None:
    plan = plan_of(timm_dir, run=(Spec("linear"), Spec("agent", {"n": 9})), stats=())
    bench = Workbench(plan)
    module = bench.network(timm_dir.name).module
    before = snapshot(module)
    with open_run(tmp_path / "run", plan.to_dict(), {}) as run:
        for cell in cells_of(plan, bench):
            run_cells([cell], run)
            assert snapshot(module) == before and not swapped_sites(module)


def test_a_cell_that_fails_leaves_the_network_as_it_was(
    timm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(timm_dir, run=(Spec("linear"),))
    bench = Workbench(plan)
    module = bench.network(timm_dir.name).module
    before = snapshot(module)
    monkeypatch.setattr("mitaswap.studies._workbench.measure", lambda *_: 1 / 0)
    with (
        pytest.raises(ZeroDivisionError),
        open_run(tmp_path / "run", plan.to_dict(), {}) as run,
    ):
        run_cells(cells_of(plan, bench), run)
    assert snapshot(module) == before
    assert not (tmp_path / "run").exists()  # no cell was finished


def test_open_run_keeps_finished_cells_and_what_was_there(tmp_path: Path) -> None:
    for number in range(2):  # a new run, then the same again
        with pytest.raises(ZeroDivisionError), open_run(tmp_path / "run", {}, {}) as run:
            run.append(f"cell {number}", [{"a": 1}])
            1 / 0  # noqa: B018
    assert len(load_rows(tmp_path / "run")) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "empty", {}, {}):
        1 / 0  # noqa: B018
    assert (tmp_path / "empty").exists()  # it was not ours


def test_trained_with_of_the_rows(timm_dir: Path, tmp_path: Path) -> None:
    trained = mitaswap.save(mitaswap.load(timm_dir), tmp_path / "own", trained_by=MITA)
    plan = Plan(
        {"timm": str(timm_dir), "own": str(trained), "agent(n=4)": str(timm_dir)},
        DIGITS,
        trained={"agent(n=4)": "agent(n=4)"},
        run=(Spec("linear"),),
    )
    found = [
        (row["model"], row["trained_with"], row["run_with"])
        for row in rows_of(plan, tmp_path / "run")
    ]
    assert found == [
        ("timm", "standard", "standard"),
        ("timm", "standard", "linear"),
        ("own", MITA, MITA),
        ("own", MITA, "linear"),
        ("agent(n=4)", "agent(n=4)", "agent(n=4)"),
        ("agent(n=4)", "agent(n=4)", "linear"),
    ]


def test_a_recipe_is_run_as_it_was_trained(timm_dir: Path, tmp_path: Path) -> None:
    recipe = {"0": MITA, "1": "agent(n=9)"}
    model = mitaswap.convert(mitaswap.load(timm_dir), recipe)
    name = f"blocks.0.attn: {MITA}; blocks.1.attn: agent(n=9)"
    saved = mitaswap.save(model, tmp_path / "mixed", trained_by=name)
    rows = rows_of(plan_of(saved, run=(Spec("linear"),), stats=("overlap",)), tmp_path / "run")
    own, linear, *overlap = rows
    assert own["trained_with"] == own["run_with"] == linear["trained_with"] == name
    expected = mitaswap.evaluate(model, "digits", limit=40)["loss"]
    assert own["loss"] == pytest.approx(expected, rel=1e-6) and own["loss"] != linear["loss"]
    assert (own["mechanism"], own["layers"]) == ("several", "blocks.0.attn; blocks.1.attn")
    # the layer of agent attention does not route
    assert {row["path"] for row in overlap} == {"blocks.0.attn"}


def test_learned_parts_are_used_where_they_were_trained(timm_dir: Path, tmp_path: Path) -> None:
    with registered(gated=Gated):
        model = mitaswap.convert(mitaswap.load(timm_dir), "gated")
        with torch.no_grad():
            gates: list[Any] = [part.gate for part in swapped_sites(model).values()]
            for gate in gates:
                gate.fill_(3.0)
        saved = mitaswap.save(model, tmp_path / "gated", trained_by="gated")
        plan = plan_of(saved, run=(Spec("standard"),))
        own, standard = rows_of(plan, tmp_path / "run")
        found = mitaswap.evaluate(model, "digits", limit=40)["loss"]
        assert own["loss"] == pytest.approx(found, rel=1e-6) and own["loss"] != standard["loss"]
        same, one = rows_of(replace(plan, layers="1"), tmp_path / "one")
        assert same["loss"] == own["loss"]  # what it was trained with is not cut down to --layers
        assert one["loss"] not in (own["loss"], standard["loss"])  # standard there, its gate here


def test_layers_are_numbered_as_walk_numbers_them(timm_dir: Path, tmp_path: Path) -> None:
    plan = plan_of(timm_dir, run=(Spec.parse(MITA),), stats=("overlap",), layers="1")
    rows = [row for row in rows_of(plan, tmp_path / "run") if row["study"] == "overlap"]
    assert {(row["layer"], row["path"]) for row in rows} == {(1, "blocks.1.attn")}


def test_other_weights_are_another_plan(timm_dir: Path, tmp_path: Path) -> None:
    saved = mitaswap.save(mitaswap.load(timm_dir), tmp_path / "own")
    before = Workbench(plan_of(saved)).contents()["weights"]
    assert Workbench(plan_of(saved)).contents()["weights"] == before
    model = mitaswap.load(saved)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    mitaswap.save(model, saved)
    after = Workbench(plan_of(saved)).contents()["weights"]
    assert list(after) == list(before) == ["own"] and after != before


def test_own_recipe_is_read_back_from_its_name(timm_dir: Path, tmp_path: Path) -> None:
    saved = mitaswap.save(mitaswap.load(timm_dir), tmp_path / "own", trained_by="0: mita; *: agent")
    assert (
        json.loads((saved / "config.json").read_text())[KEY]["trained_with"] == "0: mita; *: agent"
    )
    own = Workbench(plan_of(saved)).own("own")
    assert own == Recipe.of({"0": "mita(m=25,k=25)", "*": "agent(n=49)"})


# --- overlap (the paper's Fig. 5) ----------------------------------------------------------------


def routing(batch: int, heads: int, experts: int, width: int, taken: int, tokens: int) -> Routing:
    """A random routing; some experts are asked by nobody."""
    generator = torch.Generator().manual_seed(tokens)
    order = torch.rand(batch, heads, experts, tokens, generator=generator).argsort(-1)
    asked = torch.rand(batch, heads, tokens, experts, generator=generator)
    asked[..., 0] = -1  # the first expert comes last for every query
    return Routing(order[..., :width], asked.argsort(-1, descending=True)[..., :taken])


def overlap_by_hand(parts: list[Routing], tokens: int, head: int) -> dict[str, float]:
    """IoU of the key positions an expert gathered with the query positions routed to it."""
    found = []
    for part in parts:
        for b in range(part.members.shape[0]):
            for expert in range(part.members.shape[2]):
                keys = set(part.members[b, head, expert].tolist())
                queries = {
                    n for n in range(tokens) if expert in part.choice[b, head, n].tolist()
                }  # fmt: skip
                found.append(len(keys & queries) / len(keys | queries))
    return {"value": sum(found) / len(found), "low": min(found), "high": max(found)}


@pytest.mark.parametrize("taken", [1, 2])
def test_overlap_equals_its_definition(taken: int) -> None:
    layout = TokenLayout(1, (4, 5))
    parts = [routing(batch, 2, 4, 6, taken, layout.tokens) for batch in (3, 2)]
    statistic = STATISTICS.get("overlap")()
    for part in parts:
        statistic.update(part, layout)
    rows: list[dict[str, Any]] = list(statistic.rows())
    assert [row["head"] for row in rows] == [0, 1]
    for head, row in enumerate(rows):
        expected = overlap_by_hand(parts, layout.tokens, head)
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        assert row["empty"] == pytest.approx(0.25)  # the expert that nobody asks
        assert (row["experts"], row["width"], row["tokens"], row["images"]) == (4, 6, 21, 5)
    assert rows[0]["value"] != rows[1]["value"]


def test_overlap_of_clusters_is_one() -> None:
    places = torch.arange(12).view(1, 1, 3, 4)
    owner = torch.arange(12).div(4, rounding_mode="floor").view(1, 1, 12, 1)
    statistic = STATISTICS.get("overlap")()
    statistic.update(Routing(places, owner), TokenLayout(0, (3, 4)))
    (row,) = statistic.rows()
    assert (row["value"], row["low"], row["high"], row["empty"]) == (1, 1, 1, 0)


def test_chance_of_the_paper_is_about_three_percent() -> None:
    # 196 tokens on 25 experts: about 8 queries each
    assert float(chance_table(196, 25)[8]) == pytest.approx(0.03, abs=0.005)


@pytest.mark.parametrize(("tokens", "width"), [(21, 6), (65, 9), (196, 25)])
def test_chance_equals_simulation(tokens: int, width: int) -> None:
    table, generator = chance_table(tokens, width), torch.Generator().manual_seed(0)
    assert table.shape == (tokens + 1,) and table.dtype == torch.float64
    assert table[0] == 0 and float(table[tokens]) == pytest.approx(width / tokens)
    keys = torch.rand(4000, tokens, generator=generator).argsort(-1) < width
    for queries in (1, width, tokens // 2, tokens - 1):
        drawn = torch.rand(4000, tokens, generator=generator).argsort(-1) < queries
        iou: Tensor = (keys & drawn).sum(-1) / (keys | drawn).sum(-1)
        error = 5 * float(iou.std()) / 4000**0.5  # five standard errors of the mean
        assert float(table[queries]) == pytest.approx(float(iou.mean()), abs=error + 1e-12)


def test_chance_of_rows_is_that_of_their_set_sizes() -> None:
    layout = TokenLayout(1, (4, 5))
    part = routing(40, 1, 4, 6, 1, layout.tokens)
    statistic = STATISTICS.get("overlap")()
    statistic.update(part, layout)
    (row,) = statistic.rows()
    # random routing is at its chance level; the table is asked with each expert's own count
    counts = torch.nn.functional.one_hot(part.choice[..., 0], 4).sum(2)
    assert row["chance"] == pytest.approx(float(chance_table(21, 6)[counts].mean()))
    assert row["value"] == pytest.approx(float(row["chance"]), abs=0.03)


def test_statistics_need_a_layer_that_routes(timm_dir: Path) -> None:
    network = open_network(str(timm_dir))
    decoded = Images(DIGITS).decoded(network)
    handle = mitaswap.swap(network.module, "linear")
    with pytest.raises(MitaswapError, match="run with linear has no layer that routes"):
        evaluation.observe_routing(network, handle, ["overlap"], decoded, DIGITS)


def test_routing_is_the_one_that_was_run(timm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistic sees the experts of the very forward: those of its queries, layer by layer."""
    network = open_network(str(timm_dir))
    decoded = Images(replace(DIGITS, limit=4)).decoded(network)
    ran: list[Tensor] = []
    cls = MECHANISMS.get("mita")
    real = cls.reference

    def reference(self: Any, q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Tensor:
        ran.append(self.route(q, k, **extra).members)
        return real(self, q, k, v, **extra)

    handle = mitaswap.swap(network.module, MITA)
    monkeypatch.setattr(cls, "reference", reference)
    seen: list[Tensor] = []
    overlap = STATISTICS.get("overlap")
    monkeypatch.setattr(overlap, "update", lambda self, part, layout: seen.append(part.members))
    monkeypatch.setattr(overlap, "rows", lambda self: [])
    evaluation.observe_routing(network, handle, ["overlap"], decoded, DIGITS)
    assert len(seen) == len(ran) == 2
    assert all(torch.equal(a, b) for a, b in zip(seen, ran, strict=True))


def test_a_run_is_opened_by_one_process_only(timm_dir: Path, tmp_path: Path) -> None:
    with (
        open_run(tmp_path / "run", {}, {}) as run,
        pytest.raises(MitaswapError, match="another process has the run"),
        open_run(tmp_path / "run", {}, {}),
    ):
        raise AssertionError("two at once")
    assert isinstance(run, Run) and (tmp_path / "run").exists()


@pytest.fixture
def own_mita(timm_dir: Path, tmp_path: Path) -> Path:
    """A directory that says that it was trained with MiTA."""
    return mitaswap.save(mitaswap.load(timm_dir), tmp_path / "own", trained_by="mita(m=9,k=9)")


def test_layers_change_what_is_run_there_and_nothing_else(own_mita: Path, tmp_path: Path) -> None:
    """The baseline is the network as it was trained, whatever --layers says."""
    whole = rows_of(plan_of(own_mita, run=(Spec("linear"),)), tmp_path / "whole")
    some = rows_of(plan_of(own_mita, run=(Spec("linear"),), layers="0"), tmp_path / "some")
    assert some[0]["loss"] == whole[0]["loss"]
    assert some[1]["loss"] not in (whole[0]["loss"], whole[1]["loss"])


def test_what_a_model_was_converted_to_is_among_the_cells(timm_dir: Path, tmp_path: Path) -> None:
    model = mitaswap.convert(mitaswap.load(timm_dir), "mita(m=9,k=4)", layers="0")
    saved = mitaswap.save(model, tmp_path / "converted")
    rows = rows_of(plan_of(saved, run=(Spec("linear"),)), tmp_path / "run")
    assert [row["trained_with"] for row in rows] == ["standard"] * 3
    assert rows[1]["run_with"] == "blocks.0.attn: mita(m=9,k=4)"
    assert rows[1]["loss"] == pytest.approx(
        mitaswap.evaluate(saved, "digits", limit=40)["loss"], rel=1e-6
    )


def test_a_point_of_the_grid_that_is_a_cell_of_the_matrix_is_measured_once(
    own_mita: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[object] = []
    monkeypatch.setattr(
        "mitaswap.studies._workbench.measure",
        lambda *args: measured.append(args) or measure(*args),
    )
    plan = plan_of(own_mita, grid={"K": (9,), "N": (9,)})
    grid, matrix = rows_of(plan, tmp_path / "run")
    assert len(measured) == 1 and grid["loss"] == matrix["loss"]
    assert (grid["study"], matrix["study"]) == ("grid", "matrix")


def test_a_mechanism_without_options_asked_for_fits_a_small_model(tmp_path: Path) -> None:
    name = "timm:vit_tiny_patch16_224(img_size=16,patch_size=4,embed_dim=24,depth=1,num_heads=2,"
    plan = Plan({"tiny": name + "num_classes=10,pretrained=false)"}, DIGITS)
    rows = rows_of(plan, tmp_path / "run")
    assert [row["run_with"] for row in rows] == [
        "standard", "linear", "agent(n=16)", "mita(m=4,k=8)",
    ]  # fmt: skip
