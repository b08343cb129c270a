"""Tiles: the choice where no table says anything, tables and their files, the search for them, and its command."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch

from kfac_triton import ops, tuned
from kfac_triton.kernels import syrk, tiles
from kfac_triton.kernels.tiles import Choice, Key, Tile
from kfac_triton.tuning import cli, gpus, shapes
from kfac_triton.tuning import tiles as search_of
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.machine_code import Facts
from kfac_triton.tuning.shapes import Shape

CPU = torch.device("cpu")
GOOD = Facts(128, 0, 30_000, {"HGMMA": 8}, 0, {16: 12}, {16: 8}, {16: 8})


@pytest.fixture(autouse=True)
def no_table():
    """Each test with tables of its own, and none left behind."""
    tiles.use(lambda device: {})
    yield
    tiles.use(tuned.tiles_for)


# --------------------------------------------------------------------------------------------------------- the choice


def choose(n: int, d: int, batch: int = 1, dtype=torch.float32) -> tuple[int, int]:
    F, X = torch.empty(batch, d, d), torch.empty(batch, 1, n, d, dtype=dtype)
    choice = syrk.choose(F, X, batch, "tf32x3" if dtype == torch.float32 else "ieee")
    return choice.tile.block, choice.parts


def test_the_largest_tile_that_fills_the_device_its_sum_split_if_it_must_be():
    """On 132 multiprocessors, an H100's."""
    assert choose(64, 2048) == (128, 1)  # 136 tiles
    assert choose(64, 64, batch=200) == (64, 1)
    assert choose(64, 8, batch=200) == (32, 1)
    assert choose(4096, 1024) == (128, 4)  # 36 tiles
    assert choose(32768, 128, dtype=torch.bfloat16) == (32, 14)  # one tile of 128 in 32 parts at most would not do
    assert choose(64, 64)[1] == 1  # too few rows to share out


def test_a_part_keeps_enough_steps_and_the_workspace_its_bound():
    tile = Tile(128, 64, 8, 3)
    assert tiles.clipped_parts(32, tile, 1, 4 * tiles.LEAST_STEPS) == 4
    assert tiles.clipped_parts(1000, tile, 1, 10**6) == tiles.MAX_PARTS
    parts = tiles.clipped_parts(32, tile, 100, 10**6)
    assert 4 * tile.block**2 * 100 * parts <= tiles.WORKSPACE_BYTES < 4 * tile.block**2 * 100 * (parts + 1)
    assert tiles.clipped_parts(0, tile, 1, 0) == 1


def test_the_nearest_entry_of_a_table(monkeypatch):
    key = ("syrk", "float32", "tf32x3")
    near, far = ((64, 16, 4, 4, False), 2), ((32, 32, 2, 3, False), 1)
    tiles.use(lambda device: {key: {(0, 12, 10): near, (0, 6, 4): far}})

    def found(*size: int, allowed=lambda tile: True):
        return tiles.tabled(Key(*key), size, CPU, allowed)

    assert found(1, 4096, 1024) == Choice(Tile(*near[0]), 2)
    assert found(1, 5000, 1500) == found(1, 4096, 1024)
    assert found(1, 64, 16).tile.block == 32
    assert found(1, 4096, 1024, allowed=lambda tile: tile.block < 64) is None, "the other one is too far away"
    assert found(64, 2**20, 8) is None
    assert tiles.tabled(Key("syrk", "bfloat16", "ieee"), (1, 4096, 1024), CPU, lambda tile: True) is None
    assert choose(4096, 1024) == (64, 2), "the launcher asks the table first"
    assert choose(8, 1024)[1] == 1, "and splits no sum that is too short"


def test_a_device_is_asked_for_once():
    asked = []
    tiles.use(lambda device: (asked.append(device), {})[1])
    for _ in range(3):
        choose(64, 64)
    assert asked == [CPU]


# ------------------------------------------------------------------------------------------------------------ the files


ENTRY = {"kernel": "syrk", "dtype": "float32", "precision": "tf32x3", "shape": [0, 12, 10], "tile": [64, 16, 4, 4, 0]}
ENTRY |= {"parts": 2}
HELD = {"format": tuned.FORMAT, "gpu": "H100", "target": "sm_90", "source": "model", "entries": [ENTRY]}


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A device that says it is an H100, and an empty cache folder."""
    monkeypatch.setenv("KFAC_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(tuned, "target_of", lambda device: "sm_90")
    return tmp_path


def tile_of(folder) -> object:
    return tuned.tiles_for(torch.device("cuda")).get(("syrk", "float32", "tf32x3"), {}).get((0, 12, 10))


def test_the_users_file_comes_before_those_of_the_package(hopper):
    shipped = tile_of(hopper)
    search_of.write(hopper / "tiles-h100.json", HELD)
    assert tile_of(hopper) == ((64, 16, 4, 4, False), 2)
    exact = {**HELD, "entries": [{**ENTRY, "parts": 4}]}
    search_of.write(hopper / tuned.file_name("NVIDIA H100 80GB HBM3"), exact)
    assert tile_of(hopper) == ((64, 16, 4, 4, False), 4), "the longer name fits better"
    for path in hopper.iterdir():
        path.unlink()
    assert tile_of(hopper) == shipped


BAD = {
    "not JSON": ("{", "cannot be read"),
    "another format": ({**HELD, "format": "kfac-triton tiles 0"}, "is no tile file of this version"),
    "another device": ({**HELD, "target": "sm_80"}, "is for 'sm_80', and this device is 'sm_90'"),
    "an unknown source": ({**HELD, "source": "guess"}, "has the source 'guess'; allowed: model, measured"),
    "no entries": ({k: v for k, v in HELD.items() if k != "entries"}, "has an entry that cannot be read"),
    "a strange tile": ({**HELD, "entries": [{**ENTRY, "tile": [48, 16, 4, 4, 0]}]}, "no tile: (48, 16, 4, 4, 0)"),
    "too many parts": ({**HELD, "entries": [{**ENTRY, "parts": 64}]}, "64 parts"),
    "a shape of words": ({**HELD, "entries": [{**ENTRY, "shape": ["a"]}]}, "has an entry that cannot be read"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_file_that_is_refused_is_named_once_and_the_defaults_serve(hopper, caplog, fault):
    shipped = tile_of(hopper)
    held, message = BAD[fault]
    path = hopper / "tiles-h100.json"
    path.write_text(held if isinstance(held, str) else json.dumps(held))
    tiles.use(lambda device: tuned.tiles_for(torch.device("cuda")))
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        choose(4096, 1024)
        choose(4096, 1024)
    assert len(caplog.records) == 1
    assert str(path) in caplog.text and message in caplog.text
    assert tile_of(hopper) == shipped


def test_the_package_has_a_file_for_every_described_gpu():
    held = {json.loads(path.read_text())["gpu"]: path for path in tuned.shipped_files()}
    assert held.keys() == {gpu.name for gpu in gpus.GPUS}
    for name, path in held.items():
        words = gpus.find(name)
        table = tuned.read_tiles(path, words.target)
        assert {kernel for kernel, _, _ in table} == set(shapes.AXES)
        assert json.loads(path.read_text())["source"] == "model"


@pytest.mark.parametrize(
    ("device", "target", "file"),
    [
        ("NVIDIA GeForce RTX 4090", "sm_89", "tiles-rtx-4090.json"),
        ("NVIDIA L4", "sm_89", "tiles-l4.json"),
        ("NVIDIA L40S", "sm_89", "tiles-l4.json"),
        ("NVIDIA H800", "sm_90", "tiles-h100.json"),
        ("Tesla V100-SXM2-16GB", "sm_70", None),
    ],
)
def test_which_file_of_the_package_serves(hopper, device, target, file):
    first = next(tuned.candidates(device, target), None)
    assert (first and first.name) == file


# ----------------------------------------------------------------------------------------------------------- the search


class Pretended(search_of.KnownFacts):
    """Facts without a compiler: tiles of 128 spill, half of 64 copy in pieces."""

    def __init__(self) -> None:
        self.known = {}

    def learn(self, configurations, jobs, notify) -> None:
        for configuration in configurations:
            tile = configuration.tile
            facts = GOOD._replace(bulk=4, spilled=8 if tile.block == 128 else 0)
            narrow = tile.block == 64 and tile.warps == 8
            self.known[configuration.name] = facts._replace(copies={4: 40}) if narrow else facts
        notify(1, 1)


def searched(*wanted: Shape) -> search_of.Search:
    search = search_of.Search(gpus.find("H100"), wanted, Pretended())
    search.compile(1, lambda done, total: None)
    return search


def test_the_hopeless_are_thrown_out_with_reasons_and_the_rest_ranked():
    search = searched(Shape("syrk", "float32", (1, 32768, 128)), Shape("kron_matmul", "float32", (8, 64, 48, 64)))
    fallen = search.thrown_out()
    assert set(fallen) == {"bytes of registers spill", "copies of 4 bytes"}
    rows = search.rows(top=6)
    assert [(row.shape.kernel, row.problem.precision) for row in rows] == [
        ("syrk", "tf32x3"), ("syrk", "tf32"), ("kron_matmul", "tf32x3"),
    ]  # fmt: skip
    for row in rows:
        assert 1 <= len(row.ranking) <= 6
        assert [seconds for _, seconds in row.ranking] == sorted(seconds for _, seconds in row.ranking)
        assert all(choice.tile.block <= 64 and choice.tile.warps < 8 for choice, _ in row.ranking)
        assert all(choice.tile.descriptors == (row.problem.precision == "tf32") for choice, _ in row.ranking)
    assert rows[0].ranking[0][0].parts > 1, "a long sum of a small output is split"
    assert all(choice.parts == 1 for choice, _ in rows[2].ranking)


def test_what_is_written_is_what_is_read(tmp_path):
    rows = searched(Shape("syrk", "float32", (1, 4096, 1024)), Shape("conv_syrk", "bfloat16", (1, 4096, 144))).rows(3)
    path = tmp_path / "tiles.json"
    search_of.write(path, search_of.contents("H100", "sm_90", rows, "model"))
    table = tuned.read_tiles(path, "sm_90")
    for row in rows:
        key = (row.problem.kernel, row.problem.dtype, row.problem.precision)
        assert table[key][tiles.bucket(row.shape.size)] == (tuple(row.ranking[0][0].tile), row.ranking[0][0].parts)


def test_facts_are_kept_until_the_kernels_change(tmp_path, monkeypatch):
    path = tmp_path / "facts.json"
    configuration = search_of.Problem("sm_90", "syrk", "float32", "tf32x3").configuration(Tile(32, 32, 4, 3), True)
    asked = []
    monkeypatch.setattr(search_of.machine_code, "examine", lambda c, jobs: (asked.append(len(c)), [(0, GOOD)])[1])
    told = []
    search_of.KnownFacts(path).learn([configuration], 1, lambda done, total: told.append((done, total)))
    again = search_of.KnownFacts(path)
    again.learn([configuration, configuration], 1, lambda done, total: told.append((done, total)))
    assert again.known[configuration.name] == GOOD
    assert told == [(0, 1), (1, 1), (1, 1)] and asked == [1]
    monkeypatch.setattr(search_of, "_digest", lambda: "other")
    search_of.KnownFacts(path).learn([configuration], 1, lambda done, total: None)
    assert asked == [1, 1]


def test_an_interrupted_search_keeps_what_it_compiled(tmp_path, monkeypatch):
    problem = search_of.Problem("sm_90", "syrk", "float32", "tf32x3")
    both = [problem.configuration(Tile(32, 32, 4, 3), split) for split in (False, True)]

    def interrupted(configurations, jobs):
        yield 0, GOOD
        raise KeyboardInterrupt

    monkeypatch.setattr(search_of.machine_code, "examine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search_of.KnownFacts(tmp_path / "facts.json").learn(both, 1, lambda done, total: None)
    assert set(search_of.KnownFacts(tmp_path / "facts.json").known) == {both[0].name}


@pytest.mark.parametrize(
    "shape",
    [
        Shape("syrk", "float32", (2, 70, 40)), Shape("conv_syrk", "bfloat16", (1, 33, 48)),
        Shape("kron_matmul", "float32", (3, 20, 24, 20)),
    ],
    ids=lambda shape: shape.kernel,
)  # fmt: skip
def test_measuring_runs_every_candidate_on_tensors_of_its_own(interpreter, monkeypatch, shape):
    """The clock is ours: the candidate that is said to be fastest comes first."""
    problem = search_of.Problem("sm_90", shape.kernel, shape.dtype, "ieee")
    choices = [Choice(Tile(32, 32, 4, 3), 1), Choice(Tile(32, 16, 2, 2), 1), Choice(Tile(16, 32, 4, 3), 1)]
    row = search_of.Row(problem, shape, [(choice, 1.0) for choice in choices], "L2", "model")
    order, runs = [], []
    launches = search_of._launches

    def counted(row, choice, device):
        found = launches(row, choice, device)
        order.append(choice)
        return [lambda run=run: (runs.append(choice), run()) for run in found]

    said = dict(zip(choices, (3.0, 1.0, 2.0), strict=True))
    monkeypatch.setattr(search_of, "_launches", counted)
    monkeypatch.setattr(search_of, "seconds_of", lambda run, device: (run(), said[runs[-1]])[1])
    found = search_of.measured(row, CPU, rounds=2)
    assert [seconds for _, seconds in found.ranking] == [1.0, 2.0, 3.0]
    assert found.source == "measured" and order == choices
    warm_up, timed = runs[: 3 * search_of.WARM_UP], runs[3 * search_of.WARM_UP :]
    assert timed == choices * 2, "interleaved"
    assert len(warm_up) == 3 * search_of.WARM_UP


def test_an_average_is_updated_once_a_call_and_never_timed(interpreter, monkeypatch):
    """The hazard of tuning an operator that updates in place: F would decay once for each repetition. No kernel is
    tuned where it is called, and what the search times writes tensors of its own.
    """
    from triton.runtime.autotuner import Autotuner

    from kfac_triton.kernels import _grouped, _symmetric, conv_syrk, fused_update, newton_schulz

    for module in (syrk, conv_syrk, _grouped, _symmetric, fused_update, newton_schulz):
        assert not [name for name, value in vars(module).items() if isinstance(value, Autotuner)]
    F, X, half = torch.full((32, 32), 2.0), torch.ones(40, 32), torch.tensor(0.5)
    ops.syrk_([F], [X], [half * 0], [half], backend="triton")
    assert torch.equal(F, torch.full((32, 32), 1.0))

    written: list[int] = []
    launch = syrk.launch

    def noted(entries, **options):
        written.append(entries[0].F.data_ptr())
        launch(entries, **options)

    monkeypatch.setattr(syrk, "launch", noted)
    row = searched(Shape("syrk", "float32", (1, 40, 32))).rows(top=2)[0]
    search_of.measured(row, CPU, rounds=3)
    assert F.data_ptr() not in written and torch.equal(F, torch.full((32, 32), 1.0))
    assert len(set(written)) == len(row.ranking), "one tensor for each candidate"


# ----------------------------------------------------------------------------------------------------------- the shapes


def test_shapes_of_a_model_are_those_of_its_own_steps(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\nfrom torch import nn\nfrom kfac_triton.tuning import Task\n"
        "def task():\n"
        "    def batches(seed):\n"
        "        while True:\n"
        "            yield torch.randn(200, 1, 6, 6), torch.zeros(200, dtype=torch.long)\n"
        "    model = lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 5))\n"
        "    return Task(model, batches, nn.functional.cross_entropy, 'categorical')\n"
    )
    found = shapes.of(f"{path}:task")
    assert Shape("syrk", "float32", (1, 3200, 9)) in found  # patches: 200 images of 4 x 4 positions, 3 x 3 weights
    assert Shape("syrk", "float32", (1, 200, 64)) in found and Shape("syrk", "float32", (1, 200, 5)) in found
    assert Shape("kron_matmul", "float32", (1, 16, 80, 80)) in found  # rows of 16 elements
    assert Shape("kron_matmul", "float32", (1, 16, 80, 16)) in found


def test_the_standard_shapes_leave_no_common_one_alone():
    standard = [shape for shape in shapes.standard() if shape.kernel == "syrk" and shape.dtype == "float32"]
    entries = {tiles.bucket(shape.size): ((64, 16, 4, 4, False), 1) for shape in standard}
    tiles.use(lambda device: {("syrk", "float32", "tf32x3"): entries})
    for count in (1, 2, 24):
        for rows in (128, 1000, 50_000):
            for d in (30, 576, 4608):
                assert tiles.tabled(Key("syrk", "float32", "tf32x3"), (count, rows, d), CPU, lambda tile: True), d


BAD_SHAPES = {
    '{"kernel": "syrk"}': "a list of",
    "[": "Expecting value",
    '[{"kernel": "gemm", "size": [1, 2, 3]}]': "entry 0 has the kernel 'gemm'; allowed: syrk, conv_syrk, kron_matmul",
    '[{"kernel": "syrk", "dtype": "int8", "size": [1, 2, 3]}]': "entry 0 has the dtype 'int8'; allowed: float32",
    '[{"kernel": "syrk", "size": [1, 2]}]': "entry 0 has the size [1, 2]; allowed: [count, rows, d]",
    '[{"kernel": "syrk", "size": [1, 0, 2]}]': "entry 0 has the size [1, 0, 2]; allowed: [count, rows, d]",
}


@pytest.mark.parametrize("text", BAD_SHAPES)
def test_a_bad_file_of_shapes(tmp_path, text):
    path = tmp_path / "shapes.json"
    path.write_text(text)
    with pytest.raises(Mistake) as error:
        shapes.of(str(path))
    assert BAD_SHAPES[text] in str(error.value)


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs kfac-tune with facts that need no compiler; returns (status, standard output, standard error)."""
    monkeypatch.setenv("KFAC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(search_of, "KnownFacts", lambda path: Pretended())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(list(arguments))
        return (status, *capsys.readouterr())

    return run


def shapes_file(tmp_path) -> str:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps([{"kernel": "syrk", "dtype": "bfloat16", "size": [1, 4096, 1024]}]))
    return str(path)


def test_offline_tuning_writes_a_file_that_the_optimizer_finds(command, tmp_path):
    pytest.importorskip("triton")
    status, out, _ = command("kernels", "--target", "sm_90", "--shapes", shapes_file(tmp_path))
    path = tmp_path / "cache" / "tiles-h100.json"
    assert status == 0 and out.splitlines()[-1] == str(path)
    said = " ".join(out.split())
    assert "no GPU was measured" in said and "thrown out" in said and "1×4096×1024" in said
    assert json.loads(path.read_text())["source"] == "model"
    assert next(tuned.candidates("NVIDIA H100 80GB HBM3", "sm_90")) == path
    status, out, _ = command("show", str(path))
    assert status == 0 and "bfloat16" in out and "no GPU was measured" in " ".join(out.split())


def test_quiet_prints_the_files_name_alone(command, tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "mine.json"
    found = command("kernels", "--gpu", "h200", "--shapes", shapes_file(tmp_path), "--out", str(out), "-q")
    assert found == (0, f"{out}\n", "")
    assert json.loads(out.read_text())["gpu"] == "H200"


MISTAKES = {
    ("kernels",): "no GPU here to find by itself; name a generation with --target, as sm_90",
    ("kernels", "--target", "sm_70"): "--target sm_70: no GPU of target 'sm_70' is described; allowed: sm_90",
    ("kernels", "--gpu", "V100"): "--gpu V100: no GPU of target auto is described under it; allowed: H100",
    (
        "kernels",
        "--gpu",
        "L4",
        "--target",
        "sm_90",
    ): "no GPU of target sm_90 is described under it; allowed: H100, H200",
    ("kernels", "--target", "sm_90", "--shapes", "nothing.json"): "--shapes nothing.json",
    ("kernels", "--target", "sm_90", "--top", "0"): "--top 0",
    ("show", "nothing.json"): "nothing.json cannot be read",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_users_mistake_is_one_line_and_status_2(command, arguments):
    pytest.importorskip("triton")
    status, out, error = command(*arguments)
    assert status == 2 and out == ""
    assert error.startswith("kfac-tune: ") and error.count("\n") == 1 and MISTAKES[arguments] in error


def test_without_triton_the_command_says_so(command, monkeypatch):
    from kfac_triton.kernels import _launch

    monkeypatch.setattr(_launch, "triton", None)
    status, _, error = command("kernels", "--target", "sm_90")
    assert status == 2 and "triton is not installed" in error


def test_help_loads_neither_torch_nor_triton():
    import subprocess

    code = "import sys\nfrom kfac_triton.tuning.cli import main\nmain(['--help'])\nprint('optuna' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False"
