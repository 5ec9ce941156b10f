"""The part `models` of `benchmarks.fuzz`: folders of saved pipelines with damage of every kind."""

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from uplift_diffusers import (
    AutoencoderLocal,
    UPLiFTFeaturePipeline,
    UPLiFTModel,
    UPLiFTSuperResolutionPipeline,
    embedded_bundle,
)
from uplift_diffusers.cli.main import main
from uplift_diffusers.loading import LoadingError, load_pipeline, load_vae

Damage = Callable[[Path, np.random.Generator], None]

CANARY = "canary"
"""A folder that any code of a model would make."""

_BROKEN_JSON = (
    *(b"", b"[]", b"{}", b'"x"', b"7", b"null", b"true", b"{", b'{"a":', b"[" * 100_000, b'{"a":' * 100_000, b"NaN"),
    *(b"1e999", b"-" + b"9" * 5000, b"\0\xff", b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b" " * 2_000_000, b"{}{}"),
    *(b'{"_class_name": "AutoencoderKL", "_class_name": 3}', b"'x'", b"\x80\x04N.", b'{"\\ud800": 1}'),
)
_ODD_VALUES = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 64, 999),
    *(3.5, -0.0, 1e308, float("nan"), float("inf"), 10**5, 10**6, 10**9),
    *(10**30, "", "x", "none", "\x1b[31m", "../../x", "os.system", "a" * 5000, []),
    *({}, [[]], ["x"], [None], [1], [8, 8]),
    *([8, 8, 8, 8, 8, 8, 8, 8], [10**5] * 4, [-8, 8], [0], [1] * 20_000, {"a": 1}, {"_class_name": "AutoencoderKL"}),
)
_ADDED_KEYS = (
    *("auto_map", "quantization_config", "custom_pipeline", "_name_or_path", "_diffusers_version", "dtype", "self"),
    *("torch_dtype", "use_safetensors", "__class__", "trust_remote_code", "device_map", "image_size", "scale"),
)
_CLASS_NAMES = (
    *("UNet2DModel", "AutoencoderKL", "AutoencoderTiny", "AutoencoderDC"),
    *("AutoencoderLocal", "UPLiFTModel", "ModelMixin"),
    *("AutoencoderMixin", "AutoencoderKLWan", "AsymmetricAutoencoderKL", "VQModel"),
    *("StableDiffusionPipeline", "os", ""),
    *("evil.Evil", "Evil", "../evil", ["evil", "Evil"]),
    *(["os", "system"], ["diffusers", "AutoencoderKL"], [None, None]),
    *(["transformers", "CLIPTextModel"], ["evil", None], ["", ""], ["diffusers", "ModelMixin"], ["builtins", "exec"]),
    *(["uplift_diffusers", "AutoencoderLocal"], ["uplift_diffusers.loading", "load_vae"], ["antigravity", "x"]),
)
_DTYPES = (torch.int64, torch.uint8, torch.bool, torch.float16, torch.float64, torch.float8_e4m3fn, torch.complex64)


def prepare(folder: Path) -> Callable[[int], tuple[str, str]]:
    """
    Save what is damaged below `folder`.

    Returns:
        The function that tries the case of a seed: what happened (`opened`, `refused`, `traceback` or `code`), and
        the model, the damage and the way it was loaded, in words.
    """
    sources, canary = save_models(folder / "whole"), folder / CANARY
    photo = folder / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(photo)
    ways = {
        **dict.fromkeys(("upscale", "upscale", "upscale --vae"), _commands),
        **{"load_pipeline": _load, "load_vae": _load, "from_pretrained": _load},
    }

    def attempt(seed: int) -> tuple[str, str]:
        rng = np.random.default_rng(seed)
        name = _pick(rng, sorted(sources))
        model = folder / "model"
        _remove(model)
        shutil.copytree(sources[name], model)
        damages = [_pick(rng, DAMAGES) for _ in range(int(rng.choice([1, 1, 1, 2, 3])))]
        for damage in damages:
            with contextlib.suppress(Exception):  # an earlier one took what this one damages
                damage(model, rng, canary)
        way = "features" if name == "features" else _pick(rng, sorted(ways))
        try:
            outcome, said = _commands(way, model, photo) if way == "features" else ways[way](way, model, photo)
        finally:
            _remove(model)
            _remove(folder / "output")
        if canary.exists():
            outcome = "code"
            _remove(canary)
        return outcome, f"{name}, {', '.join(damage.__name__.strip('_') for damage in damages)}, {way}: {said}"

    return attempt


def _commands(way: str, model: Path, photo: Path) -> tuple[str, str]:
    """A command with `--model`: 0, or 1 or 2 and one line."""
    output = model.parent / "output"
    command, *_ = way.split()
    parts = ["--model", str(model)]
    if way.endswith("--vae"):
        parts = ["--model", str(model / "upsampler"), "--vae", str(model)]
    arguments = [command, str(photo), "--output", str(output / "large.png"), "--device", "cpu", *parts]
    told, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(said):
        code = main(arguments)
    lines = told.getvalue().splitlines()
    is_fine = (code == 0 or (code in (1, 2) and len(lines) == 1)) and "Traceback" not in told.getvalue()
    outcome = ("opened" if code == 0 else "refused") if is_fine else "traceback"
    return outcome, f"{code} {told.getvalue()!r:.400}"


def _load(way: str, model: Path, photo: Path) -> tuple[str, str]:
    """A function of Python: a LoadingError of one line; of `from_pretrained`, whatever diffusers raises."""
    try:
        if way == "from_pretrained":
            logs = io.StringIO()
            with contextlib.redirect_stderr(logs):
                UPLiFTSuperResolutionPipeline.from_pretrained(model)
        else:
            {"load_pipeline": load_pipeline, "load_vae": load_vae}[way](model)
    except LoadingError as error:
        return "refused" if len(str(error).splitlines()) == 1 else "traceback", str(error)
    except Exception as error:
        if way != "from_pretrained":
            raise
        return "refused", type(error).__name__
    return "opened", ""


def save_models(folder: Path) -> dict[str, Path]:
    """Whole pipelines by name, small ones with random weights and the embedded one."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    four = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    vaes = {
        "local": AutoencoderLocal(latent_channels=8, latent_space="uplift-embedded", **blocks),
        "tiny": AutoencoderTiny(latent_channels=4, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4, **four),
        "kl": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
        ),
    }
    for name, vae in vaes.items():
        space = "uplift-embedded" if name == "local" else "sd15-vae"
        upsampler = _upsampler(8 if name == "local" else 4, space)
        UPLiFTSuperResolutionPipeline(vae, upsampler, latent_space=space).save_pretrained(folder / name)
    shutil.copytree(embedded_bundle(), folder / "embedded")
    backbone = Dinov2Model(
        Dinov2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1, image_size=32, patch_size=8
        )
    )
    upsampler = _upsampler(16, "dinov2-s14")
    pipeline = UPLiFTFeaturePipeline(backbone, upsampler, feature_space="dinov2-s14")
    pipeline.save_pretrained(folder / "features")
    return {path.name: path for path in folder.iterdir()}


def _upsampler(channels: int, space: str) -> UPLiFTModel:
    return UPLiFTModel(
        latent_channels=channels,
        latent_space=space,
        encoder_block_out_channels=(8, 8),
        encoder_layers_per_block=1,
        decoder_channels=16,
        refiner_channels=16,
        refiner_layers=1,
        noise_channels=4,
    )


# Damage: of a folder, by a random generator; the last argument is the canary


def _json_of_another_shape(model: Path, rng: np.random.Generator, canary: Path) -> None:
    _pick_file(model, rng, "*.json").write_bytes(_pick(rng, _BROKEN_JSON))


def _odd_value(model: Path, rng: np.random.Generator, canary: Path) -> None:
    def change(content: dict) -> None:
        key = _pick(rng, sorted(content))
        if isinstance(content[key], list) and content[key] and rng.random() < 0.4:
            content[key][int(rng.integers(len(content[key])))] = _pick(rng, _ODD_VALUES)
        else:
            content[key] = _pick(rng, _ODD_VALUES)

    _change_json(model, rng, change)


def _key_removed(model: Path, rng: np.random.Generator, canary: Path) -> None:
    _change_json(model, rng, lambda content: content.pop(_pick(rng, sorted(content))))


def _key_added(model: Path, rng: np.random.Generator, canary: Path) -> None:
    odd = (*_ODD_VALUES, {"AutoModel": "evil.Evil"}, {"quant_method": "bitsandbytes"}, {"quant_method": "torchao"})
    key = _pick(rng, (*_ADDED_KEYS, "unknown"))
    _change_json(model, rng, lambda content: content.update({key: _pick(rng, odd)}))


def _class_renamed(model: Path, rng: np.random.Generator, canary: Path) -> None:
    def change(content: dict) -> None:
        keys = [key for key, value in content.items() if key == "_class_name" or isinstance(value, list)]
        content[_pick(rng, keys)] = _pick(rng, _CLASS_NAMES)

    _change_json(model, rng, change)
    _code_added(model, rng, canary)


def _code_added(model: Path, rng: np.random.Generator, canary: Path) -> None:
    code = f"import os\nos.makedirs({str(canary)!r}, exist_ok=True)\nclass Evil: pass\n"
    for folder in (model, model / "vae", model / "upsampler", model / "backbone"):
        if folder.is_dir():
            for name in ("evil.py", "pipeline.py", "__init__.py", "conftest.py", "sitecustomize.py"):
                (folder / name).write_text(code)
    index = json.loads((model / "model_index.json").read_text())
    if rng.random() < 0.5:
        index["_class_name"] = _pick(rng, (["pipeline", "Evil"], ["evil", "Evil"], "Evil"))
    if rng.random() < 0.5:
        index["auto_map"] = {"DiffusionPipeline": "evil.Evil", "AutoModel": "evil.Evil"}
    (model / "model_index.json").write_text(json.dumps(index))


def _tensors_changed(model: Path, rng: np.random.Generator, canary: Path) -> None:
    path = _pick_file(model, rng, "*.safetensors")
    tensors = load_file(path)
    name = _pick(rng, sorted(tensors))
    tensor = tensors[name]
    kind = int(rng.integers(9))
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[_pick(rng, ("more", "", "\x1b[31m", "vae.0", "x" * 5000))] = torch.zeros(1)
    elif kind == 2:
        tensors[f"module.{name}"] = tensors.pop(name)
    elif kind == 3:
        tensors[name] = tensor.abs().to(_pick(rng, _DTYPES))
    elif kind == 4:
        twice = tensor.repeat(2, *[1] * (tensor.ndim - 1))
        tensors[name] = _pick(rng, (tensor.flatten(), tensor[None], tensor[:0], tensor.sum(), twice))
    elif kind == 5:
        tensors[name] = torch.full_like(tensor, _pick(rng, (float("nan"), float("inf"), 1e30, 0.0)))
    elif kind == 6:
        dtype = _pick(rng, _DTYPES)
        tensors = {key: value.abs().to(dtype) for key, value in tensors.items()}
    elif kind == 7:
        tensors = {}
    else:
        others = load_file(_pick_file(model, rng, "*.safetensors"))
        tensors = others if rng.random() < 0.5 else {**tensors, **others}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)


def _weights_of_bytes(model: Path, rng: np.random.Generator, canary: Path) -> None:
    path = _pick_file(model, rng, "*.safetensors")
    data = bytearray(path.read_bytes())
    kind = int(rng.integers(5))
    if kind == 0:
        del data[int(rng.integers(len(data))) :]
    elif kind == 1:
        data += bytes(int(rng.integers(1, 100)))
    elif kind == 2:
        for _ in range(int(rng.integers(1, 20))):
            data[int(rng.integers(min(len(data), 4000)))] ^= 1 << int(rng.integers(8))
    elif kind == 3:
        data[:8] = struct.pack("<Q", _pick(rng, (0, 1, 7, 2**20, 2**31, 2**40, 2**63, 2**64 - 1, len(data) - 8)))
    else:
        others = (b"", b"not weights", b"\0" * 8, b"PK\3\4" + bytes(50), b"\x80\x04N.", b"\2" + bytes(7) + b"{}")
        data = bytearray(_pick(rng, others))
    path.write_bytes(data)


def _header_that_lies(model: Path, rng: np.random.Generator, canary: Path) -> None:
    path = _pick_file(model, rng, "*.safetensors")
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = _pick(rng, sorted(set(header) - {"__metadata__"}))
    kind = int(rng.integers(8))
    if kind == 0:
        header[name]["data_offsets"] = _pick(rng, ([0, 2**40], [0, 0], [8, 4], [-4, 0], [], "x", [0, 2**64], [1, 5]))
    elif kind == 1:
        header[name]["dtype"] = _pick(rng, ("F99", "I64", "BOOL", "", None, 3, "F64", "F4"))
    elif kind == 2:
        header[name]["shape"] = _pick(rng, ([], [2**40], [0], [-1], "x", [2**62, 2**62], [1] * 1000, [1.5], None))
    elif kind == 3:
        odd = ({"__metadata__": 3}, {"__metadata__": {"format": 3}})
        header = _pick(rng, ([], {}, 7, {name: header[name]}, {name: {}}, *odd))
    elif kind == 4:
        header["__metadata__"] = _pick(rng, (None, [], "x", {"format": "np"}, {"format": "tf"}, {"format": "x"}, {}))
    elif kind == 5:
        other = _pick(rng, sorted(set(header) - {"__metadata__"}))
        header[name]["data_offsets"] = header[other]["data_offsets"]
    elif kind == 6:
        header.update(
            {f"more.{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(9)}
        )
    else:
        header[name]["shape"], header[name]["data_offsets"] = [2**16, 2**16], [0, 2**34]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    if kind == 7:
        os.truncate(path, 8 + len(text) + 2**34)  # as large as it says, without taking space


class _Evil:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def _pickles(model: Path, rng: np.random.Generator, canary: Path) -> None:
    path = _pick_file(model, rng, "*.safetensors")
    data = pickle.dumps(_Evil(canary))
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        torch.save({"x": _Evil(canary)}, buffer)
        data = buffer.getvalue()
    names = (
        path.name,
        f"{path.stem}.bin",
        "pytorch_model.bin",
        "diffusion_pytorch_model.ckpt",
        "model.pt",
        "model.pth",
    )
    if rng.random() < 0.8:
        path.unlink()
    path.with_name(_pick(rng, names)).write_bytes(data)


def _shards(model: Path, rng: np.random.Generator, canary: Path) -> None:
    path = _pick_file(model, rng, "*.safetensors")
    names = sorted(load_file(path))
    elsewhere = ("../../photo.png", "/etc/passwd", "x.bin", "", path.name, "a.safetensors", "/dev/zero", 3, None)
    target = _pick(rng, elsewhere)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, target)}
    if rng.random() < 0.3:
        index = _pick(rng, ({}, [], {"weight_map": []}, {"weight_map": {}}, {"weight_map": None}, "x"))
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    if rng.random() < 0.7:
        path.unlink()
    (path.parent / "x.bin").write_bytes(pickle.dumps(_Evil(canary)))


def _another_kind_of_file(model: Path, rng: np.random.Generator, canary: Path) -> None:
    path = _pick_file(model, rng, "*")
    if rng.random() < 0.2:
        path = _pick(rng, sorted(folder for folder in model.iterdir() if folder.is_dir()))
    kind = int(rng.integers(9))
    _remove(path)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path)
    elif kind == 2:
        path.symlink_to(model / "nowhere")
    elif kind == 3:
        path.symlink_to(_pick(rng, ("/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem", "/proc/self/maps", "/")))
    elif kind == 4:
        os.mkfifo(path)
    elif kind == 5:
        path.symlink_to(model)
    elif kind == 6:
        path.write_bytes(b"a file")


def _file_renamed(model: Path, rng: np.random.Generator, canary: Path) -> None:
    path = _pick_file(model, rng, "*")
    names = (
        path.name.upper(),
        f"{path.stem}.fp16{path.suffix}",
        f"{path.name}.bak",
        "model.safetensors",
        "config.json",
    )
    path.rename(path.with_name(_pick(rng, names)))


def _files_exchanged(model: Path, rng: np.random.Generator, canary: Path) -> None:
    first, second = _pick_file(model, rng, "*"), _pick_file(model, rng, "*")
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


DAMAGES: tuple[Damage, ...] = (
    *(_json_of_another_shape, _odd_value, _odd_value, _odd_value),
    *(_odd_value, _key_removed, _key_added, _class_renamed),
    *(_code_added, _tensors_changed, _tensors_changed, _weights_of_bytes, _header_that_lies, _pickles, _shards),
    *(_another_kind_of_file, _file_renamed, _files_exchanged),
)


def _pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


def _pick_file(model: Path, rng: np.random.Generator, pattern: str) -> Path:
    return _pick(rng, sorted(path for path in model.rglob(pattern) if path.is_file()))


def _change_json(model: Path, rng: np.random.Generator, change: Callable[[dict], None]) -> None:
    path = _pick_file(model, rng, "*.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
