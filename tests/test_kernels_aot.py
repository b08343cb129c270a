"""Every tile that a launcher may choose, compiled for real targets with no GPU present, against the facts on record.

`kernel_facts.json` holds what stands in the machine code. A change that makes one of these worse fails here; one that
changes them otherwise is put on record by `python tests/test_kernels_aot.py`, which the diff then shows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from kfac_triton import tuned
from kfac_triton.kernels import _grouped, conv_syrk, newton_schulz, syrk
from kfac_triton.kernels.tiles import Tile
from kfac_triton.tuning.machine_code import Configuration, Facts, examine

pytest.importorskip("triton")
pytestmark = pytest.mark.xdist_group("ahead of time")  # one worker compiles, once

RECORD = Path(__file__).with_name("kernel_facts.json")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
QUICK_TARGETS = ("sm_90", "gfx942")  # one of either vendor
# Registers may grow by this much before a change counts as worse: neither occupancy nor spilling follows from less.
REGISTERS = 8


def shipped() -> list[Configuration]:
    """Everything a launcher chooses by itself, or finds in the files that come with the package."""
    found: list[Configuration] = []
    for target in TARGETS:
        exact = ("ieee", "bf16x6") if target == "gfx942" else ("tf32x3",)
        for dtype in ("fp32", "bf16", "fp16"):
            kind, precisions = ("float32", exact) if dtype == "fp32" else ("half", ("ieee",))
            for precision in precisions:
                found += of_syrk(target, dtype, syrk.TILES[kind], precision)
                found += [
                    Configuration(target, "conv_syrk", dtype, tile, precision, (("split", split),))
                    for tile in conv_syrk.TILES[kind]
                    for split in (False, True)
                ]
        if target in ("sm_90", "sm_100"):
            found += [
                Configuration(target, "syrk", "fp32", tile, "tf32", (("unit_stride", stride), ("split", split)))
                for tile in syrk.TILES["descriptors"]
                for stride in ("X_col", "X_row")
                for split in (False, True)
            ]
        for precision in exact:
            found += of_grouped(target, precision)
        found += [Configuration(target, "symmetric_product", "fp32", tile, exact[0]) for tile in newton_schulz.TILES]
        found += [
            Configuration(target, "reduce", "fp32", Tile(side, 16, side // 16, 1), "ieee") for side in (32, 64, 128)
        ]
        found += [
            Configuration(target, "fused_update", dtype, Tile(16, 16, 4, 1), "ieee", options)
            for dtype in ("fp32", "bf16", "fp16")
            for options in ((), (("conv", True),), (("momentum", False),))
        ]
    return list(dict.fromkeys([*found, *in_files()]))


def of_syrk(target: str, dtype: str, tiles: Sequence[Tile], precision: str) -> Iterable[Configuration]:
    for split in (False, True):
        for images in (False, True):
            options = (("split", split), ("images", images))
            yield from (Configuration(target, "syrk", dtype, tile, precision, options) for tile in tiles)
            transposed = (*options, ("unit_stride", "X_row"))
            yield from (Configuration(target, "syrk", dtype, tile, precision, transposed) for tile in tiles[1:])


def of_grouped(target: str, precision: str) -> Iterable[Configuration]:
    for epilogue in (_grouped.PLAIN, _grouped.DOT, _grouped.DIVIDE, _grouped.RESIDUAL):
        for tile in _grouped.allowed_tiles(epilogue):
            for transposed in (False, True) if epilogue == _grouped.DIVIDE else (False,):
                options = (("epilogue", epilogue), ("transposed", transposed))
                yield Configuration(target, "grouped", "fp32", tile, precision, options)


def in_files() -> Iterable[Configuration]:
    """What the shipped tile files hold for these targets."""
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    for path in tuned.shipped_files():
        target = json.loads(path.read_text())["target"]
        if target not in TARGETS:
            continue
        for (kernel, dtype, precision), entries in tuned.read_tiles(path).items():
            for tile, parts in entries.values():
                options = () if kernel == "kron_matmul" else (("split", parts > 1),)
                name = "grouped" if kernel == "kron_matmul" else kernel
                yield Configuration(target, name, names[dtype], Tile(*tile), precision, options)


def one_of_each(configurations: Iterable[Configuration]) -> list[Configuration]:
    """The first of every kernel, dtype and precision."""
    found: dict[tuple[str, str, str, str], Configuration] = {}
    for one in configurations:
        found.setdefault((one.target, one.kernel, one.dtype, one.precision), one)
    return list(found.values())


ALL = shipped()
QUICK = one_of_each(configuration for configuration in ALL if configuration.target in QUICK_TARGETS)
REST = [configuration for configuration in ALL if configuration not in QUICK]
STRICT = Configuration("sm_80", "syrk", "fp32", Tile(32, 32, 2, 3), "ieee")
# Hazards put back: what the facts look like then.
UNALIGNED = Configuration("sm_80", "syrk", "fp32", Tile(64, 32, 4, 3), "tf32x3", (("unit_stride", None),))
ONE_TF32_PRODUCT = Configuration("sm_90", "syrk", "fp32", Tile(64, 32, 4, 3), "tf32", (("unit_stride", "X_col"),))
TOO_LARGE = Configuration("sm_80", "syrk", "bf16", Tile(128, 64, 4, 3), "ieee")


def facts_of(configurations: Sequence[Configuration]) -> dict[Configuration, Facts]:
    found: dict[Configuration, Facts] = {}
    for index, facts in examine(configurations):
        assert isinstance(facts, Facts), f"{configurations[index].name}: {facts}"
        found[configurations[index]] = facts
    return found


@functools.cache
def of_target(target: str) -> dict[Configuration, Facts]:
    return facts_of([configuration for configuration in REST if configuration.target == target])


@pytest.fixture(scope="module")
def quick() -> dict[Configuration, Facts]:
    return facts_of(QUICK)


@pytest.fixture(scope="module")
def others() -> dict[Configuration, Facts]:
    return facts_of([STRICT, UNALIGNED, ONE_TF32_PRODUCT, TOO_LARGE])


@pytest.fixture(scope="module")
def record() -> dict[str, dict]:
    return json.loads(RECORD.read_text())


def as_recorded(facts: Facts) -> dict:
    return json.loads(json.dumps(facts._asdict()))


def check(configuration: Configuration, facts: Facts, record: dict[str, dict]) -> None:
    assert facts.faults(configuration) == []
    assert configuration.name in record, "not on record: run python tests/test_kernels_aot.py"
    known, found = record[configuration.name], as_recorded(facts)
    assert found["registers"] <= known["registers"] + REGISTERS, "more registers"
    assert found["shared"] <= known["shared"], "more shared memory"
    assert found["matrix"].keys() >= known["matrix"].keys(), "other matrix instructions"
    for kind in ("copies", "loads", "stores"):
        widths, before = ({int(w): n for w, n in own[kind].items()} for own in (found, known))
        narrow, known_narrow = (sum(n for w, n in own.items() if w < 16) for own in (widths, before))
        assert narrow <= known_narrow + 8, f"more narrow {kind}"


@pytest.mark.parametrize("configuration", QUICK, ids=lambda c: c.name)
def test_a_configuration_of_each_kind(record, quick, configuration):
    check(configuration, quick[configuration], record)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", REST, ids=lambda c: c.name)
def test_every_other_shipped_configuration(record, configuration):
    check(configuration, of_target(configuration.target)[configuration], record)


def test_every_shipped_configuration_is_on_record(record):
    assert record.keys() == {configuration.name for configuration in ALL}


def test_the_record_holds_no_fault(record):
    """Read back from the file: no register spilled, matrix instructions, whole copies, for all that is shipped."""
    for configuration in ALL:
        known = dict(record[configuration.name])
        for kind in ("copies", "loads", "stores"):
            known[kind] = {int(width): times for width, times in known[kind].items()}
        assert Facts(**known).faults(configuration) == []


def test_matrix_instructions_of_the_newest_kind(record):
    """Warpgroup products on sm_90 and those of the tensor memory on sm_100, from tiles of 64 on."""
    for configuration in ALL:
        newest = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(configuration.target)
        if newest and configuration.tile.block >= 64 and configuration.kernel not in ("reduce", "fused_update"):
            assert newest in record[configuration.name]["matrix"], configuration.name


def test_strict_float32_multiplies_on_no_matrix_unit_of_nvidia(others):
    """Why "ieee" goes to cuBLAS there, and that the count of matrix instructions can be zero."""
    assert others[STRICT].matrix == {}


def test_faults_are_found(others):
    """Strides that nothing divides, as a bias column or shapes from a table would make them; one TF32 product without
    descriptors; a tile too large for its warps: each shows.
    """
    assert any("copies of" in fault or "loads of" in fault for fault in others[UNALIGNED].faults(UNALIGNED))
    assert "copies of 4 bytes" in others[ONE_TF32_PRODUCT].faults(ONE_TF32_PRODUCT)
    assert any("spill" in fault for fault in others[TOO_LARGE].faults(TOO_LARGE))


def record_all() -> None:
    """Writes the file anew, after every fault was looked for."""
    facts = facts_of(ALL)
    faults = {c.name: f.faults(c) for c, f in facts.items() if f.faults(c)}
    if faults:
        raise SystemExit(json.dumps(faults, indent=1))
    lines = [f"{json.dumps(c.name)}: {json.dumps(as_recorded(facts[c]), sort_keys=True)}" for c in ALL]
    RECORD.write_text("{\n" + ",\n".join(sorted(lines)) + "\n}\n")


if __name__ == "__main__":
    record_all()
