"""Calibration: the same input gives the same bytes, and what it fits is worth having."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from loader_fixtures import refused, tiny_config
from tiny import Listener, tiny_cache, tiny_engine, tiny_folder

from skvq.calibrate.rotate import query_metric, spread_matrix, synthesis
from skvq.calibrate.run import texts_of
from skvq.calibrate.threads import one_thread
from skvq.engine.calibrating import kept_bytes, work_bytes
from skvq.engine.codecs import unit_factor
from skvq.engine.config import CacheConfig
from skvq.engine.errors import CalibrationError, CapacityError, ModelError, OptionError, SkvqError
from skvq.kernels import reference
from skvq.kernels.interface import HeadSide
from skvq.loaders.artifact import Artifact, load_artifact, save_artifact
from skvq.loaders.files import cache_folder, write_atomically

CORPUS = "In the beginning there was a text, of no great length but long enough to be cut in pieces. " * 40


@pytest.mark.parametrize("method", ["rotate", "reorder", "plain"])
def test_same_input_same_bytes(method: str, tmp_path: Path) -> None:
    engine = tiny_engine(tiny_folder(tmp_path / "model"), tiny_cache(method="fp"))
    for name in ("once", "again"):
        engine.calibrate(tiny_cache(method=method), CORPUS, tmp_path / name, corpus_name="x", tokens=300)
    assert (tmp_path / "once").read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize("size", [32, 64, 96, 128])
def test_the_spread_matrix_is_orthogonal(size: int) -> None:
    h = spread_matrix(size)
    assert torch.allclose(h @ h.T, torch.eye(size, dtype=h.dtype), atol=1e-12)


def test_the_query_metric_does_not_depend_on_position() -> None:
    """Turning every query by one more position leaves the metric as it is, up to what a rotation leaves of a pair's energy."""
    q = torch.randn(500, 4, 32, generator=torch.Generator().manual_seed(1))
    angle = torch.linspace(0.1, 3.0, 16)
    a, b = q.chunk(2, -1)
    turned = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    assert torch.allclose(query_metric(q.square().mean(0), 2), query_metric(turned.square().mean(0), 2), rtol=1e-6)


@pytest.mark.parametrize("levels", [3, 4, 8])
def test_codes_chosen_together_err_less_where_it_counts(levels: int) -> None:
    """In an uneven metric the lattice quantizer beats rounding each code on its own, in that metric."""
    gen = torch.Generator().manual_seed(levels)
    metric = torch.diag(torch.logspace(0, -2, 64)).double().expand(2, -1, -1)
    covariance = torch.eye(64, dtype=torch.float64).expand(2, -1, -1)
    m = synthesis(covariance, metric, 0.7)
    gram = m.transpose(1, 2) @ metric @ m
    gram = (gram / gram.diagonal(dim1=1, dim2=2).mean() + 0.01 * torch.eye(64)).float()
    y = torch.randn(257, 2, 64, generator=gen)
    side = HeadSide(
        unit=torch.full((2, 1), 2.0**-5),
        clip=torch.full((2, 1), 0.8),
        metric=gram,
        factor=unit_factor(gram),
        has_metric=True,
    )
    errors = []
    for quantize in (
        lambda: reference.quantize_lattice(y, levels, side),
        lambda: reference.quantize(y.view(257, 2, 1, 64), levels, side.unit, side.clip),
    ):
        codes, scale, mid = quantize()
        decoded = (reference.e4m3_decode(x) * side.unit for x in (scale, mid))
        error = reference.dequantize(codes.view(257, 2, 1, 64), *decoded, levels).view(y.shape) - y
        errors.append(float(torch.einsum("thi,hij,thj->", error, gram, error)))
    assert errors[0] < 0.8 * errors[1], errors


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(SkvqError, match="cannot write"):
        write_atomically(tmp_path / "taken", b"data")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_calibration_of_another_rope_is_used_and_that_is_told(tmp_path: Path) -> None:
    """Automatic ones are made for each; files of before do not say what they were made with."""
    folder, made, cache = tiny_folder(tmp_path / "model"), tmp_path / "made", tiny_cache(method="plain")
    tiny_engine(folder, tiny_cache(method="fp")).calibrate(cache, CORPUS, made, corpus_name="x", tokens=300)
    for stretch, before, told in ((None, False, False), ("linear:4", False, True), ("linear:4", True, False)):
        if before:
            kept = load_artifact(made)
            save_artifact(replace(kept, header=replace(kept.header, rope="")), made)
        report = Listener()
        tiny_engine(folder, cache, calibration=made, rope_scaling=stretch, report=report)
        assert any("was made with another RoPE" in message for message in report.messages) == told


def test_nothing_but_a_calibration_is_replaced(tmp_path: Path) -> None:
    engine = tiny_engine(tiny_folder(tmp_path / "model"), tiny_cache(method="fp"))
    text, made = tmp_path / "text.txt", tmp_path / os.fsdecode(b"c\xff.st")  # whose name is not UTF-8
    text.write_text(CORPUS)
    with pytest.raises(CalibrationError, match="is there already"):
        engine.calibrate(tiny_cache(), CORPUS, text, corpus_name="x", tokens=300)
    assert text.read_text() == CORPUS
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CalibrationError, match="no calibration file"):
        engine.with_cache(tiny_cache(method="plain"), calibration=tmp_path / "pipe")
    made.touch()  # as mktemp leaves it
    for _ in range(2):
        engine.calibrate(tiny_cache(method="plain"), CORPUS, made, corpus_name="x", tokens=300)
    engine.with_cache(tiny_cache(method="plain"), calibration=made)


@pytest.mark.parametrize("changes", [{}, {"bits_budget": 3.0}])
def test_a_calibration_that_there_is_no_memory_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    cache, folder = tiny_cache(**changes), tiny_folder(tmp_path / "model")
    engine = tiny_engine(folder, tiny_cache(method="fp"))
    model = engine.parts.model.config
    needed = work_bytes(model, cache, 1, 256, 4) + kept_bytes(model, cache)
    assert work_bytes(model, cache, 1, 256, 4) > work_bytes(model, cache, 1, 128, 4)
    left = [needed - 1]
    monkeypatch.setattr("skvq.engine.calibrating.available_memory", lambda device: left[0])
    monkeypatch.setattr("skvq.engine.calibrating.rehearse", lambda *_: left.append(0))
    options: dict[str, Any] = {"corpus_name": "x", "tokens": 256}
    with pytest.raises(CapacityError, match=r"a calibration takes about .* \(skvq calibrate\) and pass its file"):
        engine.calibrate(cache, CORPUS, tmp_path / "made", **options)
    assert len(left) == 1 and not (tmp_path / "made").exists()
    left[0] = needed
    engine.calibrate(cache, CORPUS, tmp_path / "made", **options)
    assert len(left) == 2


def test_what_is_no_number_is_not_calibrated_on(tmp_path: Path) -> None:
    """Neither kept for the next run, nor read from a file."""
    folder = tiny_folder(tmp_path / "model", num_layers=2)
    engine = tiny_engine(folder, tiny_cache(method="fp"))
    engine.calibrate(tiny_cache(method="plain"), CORPUS, tmp_path / "c", corpus_name="x", tokens=300)
    good = load_artifact(tmp_path / "c")
    save_artifact(Artifact(good.header, {**good.tensors, "key_unit": good.tensors["key_unit"] / 0}), tmp_path / "broken")
    with pytest.raises(CalibrationError, match="key_unit is not all finite"):
        engine.with_cache(tiny_cache(method="plain"), calibration=tmp_path / "broken")
    engine.parts.model.weights.layers[1].mlp_norm.fill_(torch.inf)
    for method in ("rotate", "reorder", "plain"):
        with pytest.raises(ModelError, match="what layer 1 computes"):
            engine.calibrate(tiny_cache(method=method), CORPUS, tmp_path / "d", corpus_name="x", tokens=300)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("damage", ["cut", "no home", "closed"])
def test_a_kept_calibration_that_cannot_be_used_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("SKVQ_CACHE", str(tmp_path / "cache"))
    folder, cache = tiny_folder(tmp_path / "model"), tiny_cache(method="plain")
    tiny_engine(folder, cache)
    (kept,) = (tmp_path / "cache" / "calibration").iterdir()
    whole, listener = kept.read_bytes(), Listener()
    if damage == "cut":
        kept.write_bytes(whole[:-100])
    elif damage == "no home":
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        for name in ("SKVQ_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
    else:
        is_file = Path.is_file

        def closed(path: Path) -> bool:
            if path == kept:
                raise PermissionError(13, "Permission denied")
            return is_file(path)

        monkeypatch.setattr(Path, "is_file", closed)
    engine = tiny_engine(folder, cache, report=listener)
    assert any("making one" in line for line in listener.messages)
    assert kept.read_bytes() == whole and engine.generate("a")


def test_that_a_calibration_cannot_be_kept_is_told_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SKVQ_CACHE", str(tmp_path / "file" / "cache"))
    report = Listener()
    assert tiny_engine(tiny_folder(tmp_path / "model"), tiny_cache(method="plain"), report=report).generate("a")
    [line] = [line for line in report.messages if "calibration" in line]
    assert "for this run only" in line and "Not a directory" in line and "Errno" not in line


def test_a_relative_cache_folder_of_xdg_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SKVQ_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for base, wanted in (("here", tmp_path / ".cache"), ("", tmp_path / ".cache"), (str(tmp_path / "c"), tmp_path / "c")):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert cache_folder() == wanted / "skvq"


@pytest.mark.parametrize("wrong", [{"cache": None}, {"corpus": b"x"}, {"corpus_name": b"x"}])
def test_wrong_arguments_are_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    engine = tiny_engine(tiny_folder(tmp_path / "model"), tiny_cache(method="fp"))
    given = {"cache": tiny_cache(), "corpus": CORPUS, "output": tmp_path / "c", "corpus_name": "x", "tokens": 300} | wrong
    with pytest.raises(OptionError, match=next(iter(wrong))):
        engine.calibrate(**given)


def test_what_a_calibration_says_of_itself_is_checked(tmp_path: Path) -> None:
    engine, file = tiny_engine(tiny_folder(tmp_path / "model"), tiny_cache(method="fp")), tmp_path / "c"
    cache = tiny_cache(method="rotate")
    engine.calibrate(cache, CORPUS, file, corpus_name="x", tokens=300)
    made, data = load_artifact(file), file.read_bytes()
    file.write_bytes(data.replace(b'\\"seed\\": 0', b'\\"seed\\": 1'))
    assert file.read_bytes() != data
    refused(lambda: engine.with_cache(cache, calibration=file), "is damaged, its checksum")
    file.write_bytes(data.replace(b'\\"tokens\\": 300', b'\\"tokens\\": 3e1'))
    refused(lambda: engine.with_cache(cache, calibration=file), "is damaged, its tokens is '30.0'")
    negative = {name: -made.tensors[name] for name in ("key_unit", "value_clip", "key_metric")}
    half = {"key_clip": made.tensors["key_clip"].half()}
    for wrong in ({name: tensor} for name, tensor in (negative | half).items()):
        save_artifact(Artifact(made.header, {**made.tensors, **wrong}), file)
        refused(lambda: engine.with_cache(cache, calibration=file), next(iter(wrong)), "calibrate again")


def test_what_a_calibration_keeps_grows_with_layers_and_widths() -> None:
    """As measured: 60 layers of 16 heads of 128 channels took 1,215 MiB, 104 of them not for tensors; ten with a budget 486."""
    model = tiny_config(num_layers=60, num_heads=16, num_kv_heads=16, head_size=128, hidden_size=128, intermediate_size=128)
    cache = CacheConfig().fitted(model)
    assert 1000 < kept_bytes(model, cache) >> 20 < 1200
    open_, few = CacheConfig(bits_budget=3.9), replace(model, num_layers=10, attention_spans=())
    assert 400 < kept_bytes(few, open_.fitted(few)) >> 20 < 500


CUTS = [(32, (1, 32)), (2048, (1, 2048)), (2049, (2, 1024)), (8192, (4, 2048)), (6143, (3, 2047))]


@pytest.mark.parametrize(("count", "shape"), CUTS)
def test_texts_leave_hardly_a_token_over(count: int, shape: tuple[int, int]) -> None:
    assert tuple(texts_of(range(9000), count).shape) == shape


def test_the_header_tells_what_was_read(tmp_path: Path) -> None:
    engine = tiny_engine(tiny_folder(tmp_path / "model"), tiny_cache(method="fp"))
    ids = len(engine.encode(CORPUS, bos=False))
    header = engine.calibrate(tiny_cache(method="plain"), CORPUS * 9, tmp_path / "made", corpus_name="x", tokens=2049)
    assert ids * 9 > 2049 and header.tokens == 2048


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5])
def test_a_seed_that_a_fit_would_refuse_is_refused_at_once(tmp_path: Path, seed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the text is encoded, which for a long one takes minutes; so are a method that needs none and a wrong file."""
    engine = tiny_engine(tiny_folder(tmp_path / "model"), tiny_cache(method="fp"))
    monkeypatch.setattr(type(engine.parts.tokenizer), "encode", lambda *_, **__: pytest.fail("encoded"))
    with pytest.raises(OptionError, match="seed must be a whole number from 0 to 4,294,967,295"):
        engine.calibrate(tiny_cache(method="reorder"), CORPUS, tmp_path / "x", corpus_name="x", tokens=300, seed=seed)
    with pytest.raises(OptionError, match="needs no calibration"):
        engine.calibrate(tiny_cache(method="fp"), CORPUS, tmp_path / "x", corpus_name="x", tokens=300)


def test_a_thread_that_begins_while_another_calibrates_keeps_all_its_threads() -> None:
    """What it finds set is the other's one thread."""
    threads, begun, over = torch.get_num_threads(), Event(), Event()
    torch.set_num_threads(3)
    found = []

    def other() -> None:
        begun.wait()
        with one_thread():
            found.append(torch.get_num_threads())
        found.append(torch.get_num_threads())
        over.set()

    worker = Thread(target=other)
    worker.start()
    try:
        with one_thread():
            begun.set()
            over.wait()
        assert found == [1, 3] and torch.get_num_threads() == 3
    finally:
        worker.join()
        torch.set_num_threads(threads)
