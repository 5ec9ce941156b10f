"""Settings of a training run: flags, the YAML file, and what is said where they are wrong."""

import dataclasses

import pytest

from scripts.train_autoencoder import AutoencoderTrainingConfig
from uplift_diffusers.training.config import parse_config
from uplift_diffusers.training.recipes import UpsamplerTrainingConfig
from uplift_diffusers.training.train import main

REQUIRED = ["--train_data_dir", "a", "--output_dir", "b"]


@pytest.fixture
def settings_file(tmp_path):
    def write(text):
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def error_of(arguments, capsys, config_class=AutoencoderTrainingConfig):
    with pytest.raises(SystemExit) as exit_info:
        parse_config(config_class, arguments)
    assert exit_info.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_flags_are_the_fields_of_the_configuration():
    config = parse_config(UpsamplerTrainingConfig, [*REQUIRED, "--depths", "1", "3", "--no-use_ema", "--seed", "7"])
    assert (config.depths, config.use_ema, config.seed) == ((1, 3), False, 7)
    assert config.resolution == 1024
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_flags_override_the_file_which_overrides_the_defaults(settings_file):
    file = settings_file(
        "train_data_dir: a\noutput_dir: b\nlearning_rate: 1e-4\nuse_ema: true\nrandom_crop: false\n"
        "depths: [1, 2, 3]\nresolution: 512\nseed: 3\n"
    )
    config = parse_config(UpsamplerTrainingConfig, [*file, "--seed", "4", "--resolution=256"])
    assert (config.seed, config.resolution) == (4, 256)
    assert (config.learning_rate, config.use_ema, config.random_crop) == (1e-4, True, False)
    assert config.depths == (1, 2, 3)
    assert config.train_batch_size == 1


def test_settings_without_flags_are_joined_by_the_flags_of_the_process(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_latent.py", "--output_dir", "b"])
    config = parse_config(UpsamplerTrainingConfig, settings={"train_data_dir": "a", "seed": 3})
    assert (config.train_data_dir, config.output_dir, config.seed) == ("a", "b", 3)


def test_an_unknown_setting_is_named_with_the_nearest_known_one(settings_file, capsys):
    file = settings_file("train_data_dir: a\noutput_dir: b\nlearning_rat: 1.0e-4\n")
    message = error_of(file, capsys)
    assert message.endswith("there is no setting `learning_rat`. Did you mean `learning_rate`?")
    message = error_of([*REQUIRED, "--gradient_acumulation_steps=2"], capsys)
    assert "--gradient_acumulation_steps=2. Did you mean `gradient_accumulation_steps`?" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("resolution: large", "argument --resolution: invalid int value: 'large'"),
        ("resolution: 6.5", "argument --resolution: invalid int value: '6.5'"),
        ("resolution:", "`resolution` must have a value, got None"),
        ("resolution: true", "`resolution` must have a value, got True"),
        ("use_ema: 1", "`use_ema` must be true or false, got 1"),
        ("resolution: 100", "`resolution` must be a multiple of 8, got 100"),
    ],
)
def test_a_wrong_value_in_the_file_is_one_sentence(line, message, settings_file, capsys):
    assert message in error_of([*REQUIRED, *settings_file(line)], capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_batch_size", "0"], "`train_batch_size` must be at least 1, got 0"),
        (["--mixed_precision", "int8"], "`mixed_precision` must be one of auto, no, bf16, fp16, got 'int8'"),
        (["--learning_rate", "-1"], "`learning_rate` must be above 0"),
        (["--report_to", "nothing"], "`report_to` must be tensorboard, wandb or none, got 'nothing'"),
        (["--lr_scheduler", "cosin"], "`lr_scheduler` must be one of linear, cosine"),
        (["--lr_scheduler", "piecewise_constant"], "constant_with_warmup, got 'piecewise_constant'"),
        (["--lr_floor", "0.1", "--lr_scheduler", "linear"], "`lr_floor` must be 0 unless `lr_scheduler` is cosine"),
        (["--adam_beta2", "1"], "`adam_beta2` must be in [0, 1), got 1.0"),
        (["--num_train_epochs", "0"], "`num_train_epochs` must be at least 1, got 0"),
    ],
)
def test_bad_flags_end_with_one_sentence(flags, message, capsys):
    assert message in error_of([*REQUIRED, *flags], capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--latent_noise", "-1"], "`latent_noise` must be at least 0, got -1.0"),
        (["--pixel_loss", "l2"], "`pixel_loss` must be one of l1, psnr, got 'l2'"),
        (["--degraded_probability", "1.5"], "`degraded_probability` must be in [0, 1], got 1.5"),
        (["--degraded_probability", "nan"], "`degraded_probability` must be in [0, 1], got nan"),
        (["--depths", "1", "1"], "`depths` must be different whole numbers of at least 1, got (1, 1)"),
    ],
)
def test_bad_flags_of_an_upsampler_end_with_one_sentence(flags, message, capsys):
    assert message in error_of([*REQUIRED, *flags], capsys, UpsamplerTrainingConfig)


def test_epochs_drop_default_steps_and_steps_override_epochs():
    epochs = parse_config(AutoencoderTrainingConfig, [*REQUIRED, "--num_train_epochs", "3"])
    assert (epochs.max_train_steps, epochs.num_train_epochs) == (None, 3)
    both = parse_config(AutoencoderTrainingConfig, [*REQUIRED, "--num_train_epochs", "3", "--max_train_steps", "7"])
    assert (both.max_train_steps, both.num_train_epochs) == (7, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resolution: [1", "is not YAML"),
        ("- resolution", "must have lines such as `resolution: 512`"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_settings_ends_the_command_with_one_line(text, message, settings_file, tmp_path, capsys):
    file = ["--config", str(tmp_path / "missing.yaml")] if text is None else settings_file(text)
    assert main([*REQUIRED, *file]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_file_may_choose_recipe_and_method(settings_file, capsys):
    file = settings_file("recipe: embedded\nmethod: lift\ntrain_data_dir: a\noutput_dir: b\nvae: c\nunet: small\n")
    with pytest.raises(SystemExit):
        main(file)
    assert "there is no setting `unet`" in capsys.readouterr().err  # known to --method cfm alone
    with pytest.raises(SystemExit):
        main(settings_file("recipe: embeded\n"))
    assert "invalid choice: 'embeded'" in capsys.readouterr().err
