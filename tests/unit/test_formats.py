"""The forms people deploy: each, opened in a process of its own without timm and Penstock, answers as the export."""

import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock import export
from penstock.cli import main
from penstock.errors import DONE, INPUT_WRONG, InputError
from penstock.evaluate._classifier import prepared
from penstock.export import load_classifier, load_export, read_about
from penstock.formats import compare, int8, onnx, torch_export
from penstock.formats.about import About
from penstock.formats.load import open_model
from penstock.formats.network import load_network
from penstock.formats.operations import ATEN
from penstock.formats.write import export_forms
from tests.exports import CLASSES, TEMPERATURE, VIT, coloured, coloured_batch, write_classifier
from tests.shards import png, write_set
from tests.unit.test_export import made

CNN = {"name": "resnet10t", "size": 32, "channels": 1, "mean": (0.3,), "options": {"output_stride": 16}}
KINDS = ("vit", "cnn", "attentive", "backbone")
IMAGES = 16
PROGRAM = "models/model.json"

# What somebody has who deploys: torch, or onnxruntime, and the files.
ELSEWHERE = """
import json, sys
import numpy as np, onnxruntime, torch
places, out = sys.argv[1:]
answers, said = {}, {}
for place in places.split(","):
    kind, folder = place.split("=")
    images = np.load(folder + "/images.npy")
    extra = {"penstock.json": ""}
    program = torch.export.load(folder + "/model.pt2", extra_files=extra)
    found = program.module()(torch.from_numpy(images))
    answers |= {f"{kind}/torch/{name}": value.detach().numpy() for name, value in found.items()}
    single = program.module()(torch.from_numpy(images[:1]))
    answers |= {f"{kind}/torch/{name}/1": value.detach().numpy() for name, value in single.items()}
    said[f"{kind}/torch"] = extra["penstock.json"]
    session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    answers |= {f"{kind}/onnx/{n}": v for n, v in zip(names, session.run(None, {"images": images}))}
    answers |= {f"{kind}/onnx/{n}/1": v for n, v in zip(names, session.run(None, {"images": images[:1]}))}
    said[f"{kind}/onnx"] = session.get_modelmeta().custom_metadata_map["penstock"]
np.savez(out, **answers)
print(json.dumps([said, [name for name in ("penstock", "timm", "onnx") if name in sys.modules]]))
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    """Small classifiers and a backbone, each exported in both forms; the CNN with its batch norm folded."""
    torch.manual_seed(3)
    place = tmp_path_factory.mktemp("formats")
    folders = {kind: place / kind / "export" for kind in KINDS}
    write_classifier(folders["vit"], {**VIT, "size": 16})
    write_classifier(folders["cnn"], CNN)
    write_classifier(
        folders["attentive"], {**VIT, "size": 16, "channels": 1, "mean": (0.4,)}, kind="attentive", heads=4
    )
    backbone = made({**VIT, "size": 16, "pool": "avg"})
    export.export_backbone(backbone.state_dict(), backbone.config, folders["backbone"])
    for kind, folder in folders.items():
        config = load_export(folder).config
        np.save(folder.parent / "images.npy", coloured_batch(IMAGES, config.channels, *config.height_width))
        rows = export_forms(folder, folder.parent, ["torch", "onnx"], fold=kind == "cnn")
        assert [row.form for row in rows] == ["exported", "torch", "onnx"]
    return folders


@pytest.fixture(scope="module")
def elsewhere(exports, tmp_path_factory) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The answers of all files in a fresh process, and what the files say of themselves."""
    folder = tmp_path_factory.mktemp("elsewhere")
    places = ",".join(f"{kind}={path.parent}" for kind, path in exports.items())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ELSEWHERE, places, str(folder / "answers.npz")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded == []
    with np.load(folder / "answers.npz", allow_pickle=False) as answers:
        return dict(answers), said


def truth(folder: Path) -> torch.Tensor:
    """Logits, or features, of the export itself, by the code that evaluation uses."""
    images = torch.from_numpy(np.load(folder.parent / "images.npy"))
    with torch.no_grad():
        if "classes" in read_about(folder):
            return load_classifier(folder)(images)
        return load_export(folder).eval()(images).pooled


@pytest.mark.parametrize("form", ["torch", "onnx"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_answers_elsewhere(kind, form, exports, elsewhere):
    answers, want = elsewhere[0], truth(exports[kind])
    logits = answers[f"{kind}/{form}/{'features' if kind == 'backbone' else 'logits'}"]
    assert logits.dtype == np.float32 and logits.shape == want.shape
    assert len(want.argmax(1).unique()) > 1  # there is something to compare
    np.testing.assert_allclose(logits, want.numpy(), rtol=1e-4, atol=1e-4)
    single = answers[f"{kind}/{form}/{'features' if kind == 'backbone' else 'logits'}/1"]
    np.testing.assert_allclose(single, want[:1].numpy(), rtol=1e-4, atol=1e-4)
    if kind == "backbone":
        assert f"{kind}/{form}/probabilities" not in answers
        return
    assert (logits.argmax(1) == want.argmax(1).numpy()).all()
    calibrated = (want.double() / TEMPERATURE).softmax(1).numpy()
    np.testing.assert_allclose(answers[f"{kind}/{form}/probabilities"], calibrated, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", ["torch", "onnx"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_says_of_itself(kind, form, exports, elsewhere):
    said, about = json.loads(elsewhere[1][f"{kind}/{form}"]), read_about(exports[kind])
    assert said["classes"] == (None if kind == "backbone" else list(CLASSES))
    assert said["temperature"] == (1.0 if kind == "backbone" else TEMPERATURE)
    assert said["weights"] == {"model.safetensors": about["sha256"], **about["sha256_beside"]}
    assert ("head.safetensors" in said["weights"]) == (kind == "attentive")
    backbone = load_export(exports[kind])
    assert said["preprocessing"] == {
        "size": list(backbone.size),
        "channels": backbone.config.channels,
        "crop_pct": 1.0 if kind == "backbone" else 0.9,
        "interpolation": "bicubic",
        "mean": backbone.mean.tolist(),
        "std": backbone.std.tolist(),
    }
    suffix = {"torch": "pt2", "onnx": "onnx"}[form]
    assert open_model(exports[kind].parent / f"model.{suffix}").about == About.model_validate(said)


def test_batch_norm_is_folded(exports):
    folded, plain = load_network(exports["cnn"]).fold(), load_network(exports["cnn"])
    norms = [m for m in plain.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert folded.about.folded == len(norms) > 5
    program = torch.export.load(exports["cnn"].parent / "model.pt2")
    assert not [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    with pytest.raises(InputError, match="has no batch norm to fold"):
        load_network(exports["vit"]).fold()


def test_what_could_be_folded_is_told(exports, tmp_path, monkeypatch, capsys):
    from penstock.formats import network

    norms = load_network(exports["cnn"]).norms
    command = ["export", str(exports["cnn"]), "--to", "torch", "--fold", "--out", str(tmp_path)]
    assert main(command) == DONE
    assert f"{norms} of {norms} batch norms folded" in capsys.readouterr().out
    monkeypatch.setattr(network, "fold_batchnorm", lambda *_: [])
    assert main(command) == INPUT_WRONG
    assert f"0 of {norms} batch norms can be folded" in capsys.readouterr().err


def test_a_model_of_timm(tmp_path, capsys):
    """Exported into --out, and asked for labels, without a folder of its own."""
    import timm

    model: Any = timm.create_model("test_vit", num_classes=len(CLASSES)).eval()
    timm.models.save_for_hf(model, str(tmp_path / "hf"), model_config={"label_names": list(CLASSES), "num_classes": 5})
    name, out = f"timm:local-dir:{tmp_path / 'hf'}", tmp_path / "out"
    assert main(["export", name]) == INPUT_WRONG
    assert "say with --out where they go" in capsys.readouterr().err
    assert main(["export", name, "--to", "torch", "--out", str(out)]) == DONE
    assert open_model(out / "model.pt2").about == load_network(out).about
    assert main(["export", name, "--to", "torch", "--out", str(out)]) == INPUT_WRONG
    assert "holds an export already" in capsys.readouterr().err

    (tmp_path / "a.png").write_bytes(png(coloured(1, 20, 18)))
    said = []
    for place in (name, str(out)):
        assert main(["predict", place, str(tmp_path / "a.png"), "--format", "csv"]) == DONE
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "cow" in said[0]


def test_timm_opens_the_same_folder(exports, capsys):
    """The files may lie beside the weights."""
    import timm

    folder = exports["vit"]
    assert main(["export", str(folder), "--to", "torch"]) == DONE
    assert "model.pt2" in capsys.readouterr().out and (folder / "model.pt2").is_file()
    fresh: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    network, images = load_network(folder), torch.from_numpy(np.load(folder.parent / "images.npy"))
    said = network.about.preprocessing
    mean, std = (torch.tensor(values)[:, None, None] for values in (said.mean, said.std))
    with torch.no_grad():
        labels = fresh((images / 255 - mean) / std).argmax(1)
    assert torch.equal(labels, open_model(folder / "model.pt2").answers(images).argmax(1))
    (folder / "model.pt2").unlink()


def test_another_size_than_the_backbone_was_made_for(tmp_path):
    """Position embeddings are interpolated inside the file, as evaluation does."""
    folder = write_classifier(tmp_path / "export", {**VIT, "size": 16})
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["test_input_size"] = [3, 24, 24]
    (folder / "config.json").write_text(json.dumps(config))
    rows = export_forms(folder, tmp_path, ["torch", "onnx"])
    images = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
    with torch.no_grad():
        want = load_classifier(folder)(images)
    for row in rows[1:]:
        torch.testing.assert_close(open_model(row.file).answers(images), want, rtol=1e-4, atol=1e-4)
        assert open_model(row.file).about.preprocessing.size == (24, 24)


def test_int8_and_its_accuracy(exports, tmp_path, capsys):
    sets = [write_set(tmp_path / name, [40], lambda n: png(coloured(n, 20, 18)), lambda n: n % 5) for name in "ab"]
    for manifest in sets:
        replace(manifest, classes=CLASSES).save(manifest.root)
    out = tmp_path / "out"
    command = ["export", str(exports["vit"].parent), "--to", "onnx", "--int8", str(sets[0].root)]
    assert main([*command, "--val", str(sets[1].root), "--out", str(out)]) == DONE
    shown = capsys.readouterr().out
    assert sorted(file.name for file in out.iterdir()) == ["model.int8.onnx", "model.onnx"]
    small, full = open_model(out / int8.FILE), open_model(out / onnx.FILE)
    assert small.about == full.about and small.about.classes == CLASSES
    import onnx as library

    counted = [precise for _, precise in arithmetic(library.load(out / int8.FILE).graph)]
    # Patches; qkv, q k', attention v, projection; the two layers of the MLP; the classifier.
    assert counted == [True, False, True, True, False, False, False, True]

    # What is told, counted anew from images that PIL and the fixture's own words give.
    classifier = load_classifier(exports["vit"])
    augment = prepared(classifier, None, None)
    views = torch.stack([augment.view(coloured(n, 20, 18), 0, {"size": 16}) for n in range(40)])
    with torch.no_grad():
        want = classifier(views)
    got, labels = small.answers(views), torch.arange(40) % 5
    apart = ((got - want).abs() / want.abs().clamp(min=1)).max()
    assert 1e-4 < apart < 1
    differ = int((got.argmax(1) != want.argmax(1)).sum())
    row = next(line for line in shown.splitlines() if "int8 " in line)
    for words in (f"{differ} of 40", f"{100 * (got.argmax(1) == labels).double().mean():.2f} %", f"{apart:.1e}"):
        assert words in row, (words, row)
    assert "int8 takes this share of ONNX's time" in shown and "without VNNI" in shown


def arithmetic(graph: Any) -> list[tuple[str, bool]]:
    """The name of each product and convolution, in order, and whether it stays in fp32."""
    whole = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return [(node.name, not whole & set(node.input)) for node in graph.node if node.op_type in int8.OPERATIONS]


def test_both_classifiers_of_a_distilled_head_stay_in_fp32(tmp_path):
    import onnx as library

    fields = {**VIT, "name": "deit_tiny_distilled_patch16_224", "pool": "token", "size": 16}
    network = load_network(write_classifier(tmp_path / "export", fields, kind="distilled"))
    batch = torch.from_numpy(coloured_batch(8, 3, 16, 16))
    content = int8.write(onnx.write(torch_export.trace(network)), network.about, [batch])
    counted = [precise for _, precise in arithmetic(library.load_from_string(content).graph)]
    assert counted == [True, False, True, True, False, False, False, True, True]


def test_agreement_counts_images():
    want = torch.tensor([[2.0, 1.0], [0.0, 100.0], [1.0, 0.0]])
    got = torch.tensor([[2.0, 2.5], [0.0, 100.5], [1.1, 0.0]])
    found = compare.Agreement()
    found.add(got[:2], want[:2], torch.tensor([1, 1]))
    found.add(got[2:], want[2:], torch.tensor([-1]))
    assert (found.images, found.differ, found.labelled, found.correct, found.top1) == (3, 1, 2, 2, 100.0)
    assert found.largest == pytest.approx(1.5)
    assert compare.difference(torch.tensor([[float("nan")]]), torch.ones(1, 1)) == float("inf")


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
@pytest.mark.parametrize("form", [torch_export, onnx])
def test_a_form_that_computes_something_else_is_not_kept(form, kind, exports, tmp_path, monkeypatch, capsys):
    (tmp_path / form.FILE).write_bytes(b"older")
    read = form.read

    def off(content: bytes, where: Path) -> Any:
        answers, about = read(content, where)
        return (lambda images: answers(images) | {kind: answers(images)[kind] + 3e-4 * (len(images) == 1)}), about

    monkeypatch.setattr(form, "read", off)
    name = form.FILE.partition(".")[2].replace("pt2", "torch")
    assert main(["export", str(exports["attentive"]), "--to", name, "--out", str(tmp_path)]) == INPUT_WRONG
    error = capsys.readouterr().err
    assert f"gives {kind} that are 3.0e-04 from" in error and "more than 0.0001; it is not written" in error
    assert [file.name for file in tmp_path.iterdir()] == [form.FILE]
    assert (tmp_path / form.FILE).read_bytes() == b"older"


def test_a_network_that_diverged_is_not_written(tmp_path):
    folder = write_classifier(tmp_path / "export", {**VIT, "size": 16})
    network = load_network(folder)
    with torch.no_grad():
        network.classifier.head.linear.bias[2] = torch.nan
    with pytest.raises(InputError, match="own answers are not finite: it has diverged"):
        compare.check("model.pt2", network.forward, network.forward, network.example(3))


def test_damaged_files_are_named(exports, tmp_path):
    for name in ("model.pt2", "model.onnx"):
        content = (exports["vit"].parent / name).read_bytes()
        for place, damaged in enumerate((content[: len(content) // 2], b"", b"not a model at all")):
            file = tmp_path / f"{place}-{name}"
            file.write_bytes(damaged)
            with pytest.raises(InputError, match=rf"{name} is damaged, or no .*make it again"):
                open_model(file)
    flipped = bytearray((exports["vit"].parent / "model.pt2").read_bytes())
    flipped[len(flipped) // 3] ^= 0x10
    (tmp_path / "flipped.pt2").write_bytes(flipped)
    with pytest.raises(InputError, match="damaged"):
        open_model(tmp_path / "flipped.pt2")


def test_files_of_others_are_refused(exports, tmp_path):
    import onnx as library

    model = library.load(exports["vit"].parent / "model.onnx")
    library.helper.set_model_props(model, {})
    library.save(model, tmp_path / "plain.onnx")
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "plain.pt2")
    for name in ("plain.onnx", "plain.pt2"):
        with pytest.raises(InputError, match="was not written by `penstock export`"):
            open_model(tmp_path / name)
    library.helper.set_model_props(model, {"penstock": '{"version": 2}'})
    library.save(model, tmp_path / "newer.onnx")
    with pytest.raises(InputError, match="in a way unknown here"):
        open_model(tmp_path / "newer.onnx")
    for place, words in (
        (tmp_path, "is no export"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / "none.onnx", "No such file"),
    ):
        with pytest.raises(InputError, match=words):
            open_model(place)


class Harm:
    """A pickle that makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return (open, (str(self.file), "w"))


def parts_of(file: Path) -> tuple[dict[str, bytes], str]:
    """What a `.pt2` file holds, and the folder in it."""
    with zipfile.ZipFile(file) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    return parts, next(name for name in parts if name.endswith(PROGRAM)).removesuffix(PROGRAM)


def zipped(parts: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as new:
        for name, content in parts.items():
            new.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize("way", ["inputs", "weights", "target", "expression", "library"])
def test_a_file_that_would_run_code_is_not_loaded(way, exports, tmp_path):
    """torch itself unpickles, evaluates, or calls what these say."""
    mark = tmp_path / "mark"
    pickled = io.BytesIO()
    torch.save(Harm(mark), pickled)
    parts, root = parts_of(exports["attentive"].parent / "model.pt2")
    program, weights = f"{root}{PROGRAM}", f"{root}data/weights/model_weights_config.json"
    if way == "inputs":
        parts[f"{root}data/sample_inputs/model.pt"] = pickled.getvalue()
    elif way == "weights":
        config = json.loads(parts[weights])
        first = next(iter(config["config"].values()))
        first["use_pickle"] = True
        parts[weights] = json.dumps(config).encode()
        parts[f"{root}data/weights/{first['path_name']}"] = pickled.getvalue()
    elif way == "target":
        parts[program] = parts[program].replace(b"torch.ops.aten.softmax.int", b"torch.os.system", 1)
        assert b"torch.os.system" in parts[program]
    elif way == "expression":
        parts[program] = with_expression(parts[program], f"open('{mark}', 'w')")
    else:
        parts[f"{root}data/aotinductor/model/evil.so"] = b""
    (tmp_path / "bad.pt2").write_bytes(zipped(parts))
    with pytest.raises(InputError, match=r"not (safe to load|loaded)"):
        open_model(tmp_path / "bad.pt2")
    assert not mark.exists()


def with_expression(program: bytes, evil: str) -> bytes:
    """A program whose first size is the value of a Python expression."""
    text = program.decode()
    at = text.index('"expr_str": "') + len('"expr_str": "')
    return (text[:at] + evil + text[text.index('"', at) :]).encode()


def operation(name: str, inputs: dict[str, Any], outputs: list[Any]) -> dict[str, Any]:
    given = [{"name": key, "arg": value, "kind": 1} for key, value in inputs.items()]
    target = f"torch.ops.aten.{name}.default"
    return {"target": target, "inputs": given, "outputs": outputs, "metadata": {}, "is_hop_single_tensor_return": None}


def guards(program: Any, mark: Path) -> None:
    program["guards_code"] = [f"open('{mark}', 'w') is not None"]


def save(program: Any, mark: Path) -> None:
    graph = program["graph_module"]["graph"]
    tensor = {"as_tensor": {"name": graph["outputs"][0]["as_tensor"]["name"]}}
    graph["nodes"].append(operation("save", {"item": tensor, "filename": {"as_string": str(mark)}}, []))


def from_file(program: Any, mark: Path) -> None:
    graph = program["graph_module"]["graph"]
    said = next(value for value in graph["tensor_values"].values() if value["dtype"] == 7)
    graph["tensor_values"]["mapped"] = {**said, "sizes": [{"as_int": 8}], "strides": [{"as_int": 1}]}
    given = {"filename": {"as_string": str(mark)}, "shared": {"as_bool": True}, "size": {"as_int": 8}}
    graph["nodes"].append(operation("from_file", given, [{"as_tensor": {"name": "mapped"}}]))


def enumeration(program: Any, mark: Path) -> None:
    (mark.parent / "a_module_that_marks.py").write_text(f"open({str(mark)!r}, 'w')")
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    harm = {"__enum__": True, "fqn": "a_module_that_marks:X", "name": "a"}
    protocol, spec = json.loads(signature["out_spec"])
    spec["context"] = json.dumps([harm, *json.loads(spec["context"])[1:]])
    signature["out_spec"] = json.dumps([protocol, spec])


def argument(program: Any, mark: Path) -> None:
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    signature["forward_arg_names"] = [f"images, x=open('{mark}', 'w')"]


def graph_input(program: Any, mark: Path) -> None:
    bad = json.dumps(f"images=open('{mark}', 'w')")
    text = json.dumps(program["graph_module"])
    text = text.replace('"name": "images"', f'"name": {bad}').replace('"images": {', f"{bad}: {{")
    program["graph_module"] = json.loads(text)


@pytest.mark.parametrize("change", [guards, save, from_file, enumeration, argument, graph_input])
def test_a_program_that_would_run_code_is_not_loaded(change, exports, tmp_path, monkeypatch):
    """Guards and names become Python source, an enumeration is imported, an operation writes."""
    monkeypatch.syspath_prepend(tmp_path)
    mark, file = tmp_path / "mark", tmp_path / "bad.pt2"
    parts, root = parts_of(exports["attentive"].parent / "model.pt2")
    program = json.loads(parts[f"{root}{PROGRAM}"])
    change(program, mark)
    parts[f"{root}{PROGRAM}"] = json.dumps(program).encode()
    file.write_bytes(zipped(parts))
    with pytest.raises(InputError, match=r"is not loaded, for models/model\.json holds more than a network"):
        open_model(file)
    assert not mark.exists()


def two_directories(seen_by_python: bytes, seen_by_torch: bytes) -> bytes:
    """One file of two archives: Python takes offsets from the directory's end, torch from the file's start."""

    def split(archive: bytes) -> tuple[bytes, bytearray, bytes]:
        end = archive.rindex(b"PK\5\6")
        size, start = struct.unpack("<II", archive[end + 12 : end + 20])
        return archive[:start], bytearray(archive[start : start + size]), archive[end:]

    (files, directory, _), (others, theirs, end) = split(seen_by_python), split(seen_by_torch)
    assert len(directory) == len(theirs) and len(others) > len(files)
    at = 0
    while at < len(directory):
        lengths = sum(struct.unpack("<HHH", directory[at + 28 : at + 34]))
        (offset,) = struct.unpack("<I", directory[at + 42 : at + 46])
        directory[at + 42 : at + 46] = struct.pack("<I", offset + len(others) - len(files))
        at += 46 + lengths
    return others + theirs + files + directory + end


def test_torch_reads_what_was_looked_at(exports, tmp_path):
    """Python's zipfile and torch's reader find different parts in this file."""
    mark = tmp_path / "mark"
    parts, root = parts_of(exports["attentive"].parent / "model.pt2")
    program = f"{root}{PROGRAM}"
    evil = {**parts, program: with_expression(parts[program], f"open('{mark}', 'w')") + b" " * 4096}
    both = two_directories(zipped(parts), zipped(evil))
    with zipfile.ZipFile(io.BytesIO(both)) as seen:
        assert seen.read(program) == parts[program]
    assert torch._C.PyTorchFileReader(io.BytesIO(both)).get_record(PROGRAM) == evil[program]
    (tmp_path / "both.pt2").write_bytes(both)
    images = torch.from_numpy(np.load(exports["attentive"].parent / "images.npy"))
    want = open_model(exports["attentive"].parent / "model.pt2").answers(images)
    assert torch.equal(open_model(tmp_path / "both.pt2").answers(images), want)
    assert not mark.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_no_paths_of_the_machine_that_exported(kind, exports):
    parts, _ = parts_of(exports[kind].parent / "model.pt2")
    checkout = str(Path(export.__file__).parents[1]).encode()
    for content in (*parts.values(), (exports[kind].parent / "model.onnx").read_bytes()):
        assert b"site-packages" not in content and checkout not in content


def test_without_the_libraries_there_is_one_message(exports, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None)
    assert main(["export", str(exports["vit"]), "--out", str(tmp_path)]) == INPUT_WRONG
    error = capsys.readouterr().err
    assert "pip install 'penstock[export]'" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"pip install 'penstock\[export\]'"):
        open_model(exports["vit"].parent / "model.onnx")


def test_other_bad_input(exports, tmp_path, capsys):
    def refused(*words: str) -> str:
        assert main(["export", *words]) == INPUT_WRONG
        return capsys.readouterr().err

    assert "is no export and holds none" in refused(str(tmp_path))
    other = write_set(tmp_path / "set", [10])
    assert "has 5 classes and" in refused(str(exports["vit"]), "--val", str(other.root), "--out", str(tmp_path))
    assert "no batch norm" in refused(str(exports["vit"]), "--fold", "--out", str(tmp_path))
    (tmp_path / "file").write_text("")
    assert "--out" in refused(str(exports["vit"]), "--to", "torch", "--out", str(tmp_path / "file"))
    with pytest.raises(SystemExit):
        main(["export", str(exports["vit"]), "--to", "torchscript"])
    assert "'torchscript' is not one of torch, onnx" in capsys.readouterr().err


def test_known_operations_name_no_file():
    """By aten's own words: what takes text takes a mode, an equation or a message."""
    texts = {"padding", "rounding_mode", "equation", "approximate", "indexing", "mode", "assert_msg"}
    for name in ATEN:
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            arguments = getattr(packet, overload)._schema.arguments
            if any("Tensor" in str(each.type) for each in arguments):  # others compute with text alone
                taken = {each.name for each in arguments if "str" in str(each.type)}
                assert taken <= texts, (name, overload, taken)
