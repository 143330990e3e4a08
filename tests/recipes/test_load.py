import os
from pathlib import Path

import pytest

from data.errors import InputError
from recipes.config import CosineConfig
from recipes.load import load_config
from recipes.resolved import config_digest, differing_keys, resolved

YAMLS = Path(__file__).resolve().parents[2] / "yamls"
ALL_YAMLS = sorted(YAMLS.rglob("*.y*ml"))
assert {"demo", "local", "g5", "p3", "medium", "mosaic-medium"} <= {path.stem for path in ALL_YAMLS}
LEAST = "run_name: a\ndevice_batch_size: 8\ndata: {path: images}\n"


def write(folder, text, name="a.yaml"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load(folder, text, *overrides):
    return load_config(write(folder, text), overrides)


def errors(folder, text, *overrides):
    with pytest.raises(InputError) as caught:
        load(folder, text, *overrides)
    return [line.replace(f"{folder}{os.sep}", "") for line in caught.value.lines]


@pytest.mark.parametrize("path", ALL_YAMLS, ids=lambda path: str(path.relative_to(YAMLS)))
def test_every_yaml_loads_and_reads_back_equal(path, tmp_path):
    config = load_config(path)
    assert load(tmp_path, resolved(config)) == config
    assert config.run_name == path.stem
    assert path.read_text(encoding="utf-8").startswith("# ")
    # Everything that depends on time is a share of the run.
    assert load_config(path, ["max_duration=16ep"]).epochs == 16


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sed: 3", "a.yaml:4: sed: unknown key; allowed: run_name"),
        ("sed: 3", "; did you mean 'seed'?"),
        ("mixup: {alpha: 1}", "; did you mean 'algorithms.mixup'?"),
        ("algorithms: {mixip: {}}", "a.yaml:4: algorithms.mixip: unknown technique; allowed: blurpool, "),
        ("algorithms: {mixup: {alhpa: 1.0}}", "algorithms.mixup.alhpa: unknown key; allowed: alpha, "),
        ("algorithms: {mixup: {alpha: 0}}", "algorithms.mixup.alpha: got 0; allowed: a number above 0"),
        ("algorithms:\n  mixup:", "a.yaml:5: algorithms.mixup: empty; write 'mixup: {}' for on, 'mixup: off' for off"),
        ("optimizer: {lr: fast}", "optimizer.lr: got 'fast'; allowed: a number above 0"),
        ("optimizer: {lr: .nan}", "optimizer.lr: got NaN; allowed: a number above 0"),
        ("optimizer: {nesterov: 1}", "optimizer.nesterov: got 1; allowed: true or false"),
        ("seed: true", "seed: got true; allowed: a whole number from 0, below 4294967296"),
        ("precision: fp61", "precision: got 'fp61'; allowed: fp32, amp_fp16, amp_bf16"),
        (
            "scheduler: {name: cosin}",
            "scheduler.name: got 'cosin'; allowed: one_cycle, cosine, step, constant; did you mean 'c",
        ),
        ("max_duration: 90", "max_duration: got '90'; allowed: text such as 90ep"),
        ("algorithms: {ema: {half_life: 3}}", "algorithms.ema.half_life: got '3'; allowed: text: Time in which"),
        ("device_microbatch_size: {224: x}", "got {'224': 'x'}; allowed: a whole number from 1, or one per image size"),
        ("global_batch_size: 8", "device_batch_size: set together with global_batch_size"),
        ("eval: {sizes: []}", "eval.sizes: got []; allowed: a list of at least one, each a whole number"),
        ("eval: {sizes: [32, 32]}", "eval.sizes: each size once, got [32, 32]"),
        ("compile: fast", "compile: got 'fast'; allowed: true or false, or reduce-overhead"),
        ("compile: true\nmodel: {activation_checkpointing: true}", "compile: cannot compile model.activation_check"),
        ("deterministic: true\ncudnn_benchmark: true", "cudnn_benchmark: may choose other kernels in the next run"),
        ("checkpoints: {folder: '{name}'}", "checkpoints.folder: got '{name}'; allowed: a folder; {runs_folder} and"),
        ("algorithms: {swa: {}}\nmax_duration: 2ep", "algorithms.swa: needs a run of at least 3 epochs, got 2ep"),
        (
            "algorithms: {progressive_resizing: {initial_scale: 0.01}}",
            "initial_scale: makes images of 4 px; allowed: at",
        ),
    ],
)
def test_a_wrong_line_is_named_with_its_key_and_what_is_allowed(line, message, tmp_path):
    lines = errors(tmp_path, LEAST + line)
    assert len(lines) == 1
    assert message in lines[0]
    assert lines[0].startswith("a.yaml:")


def test_all_errors_come_at_once_with_their_places(tmp_path):
    write(tmp_path, LEAST + "optimizer:\n  lr: -1\n", "base.yaml")
    text = "base: base.yaml\nalgorithms:\n  mixup: {interpolate_loss: true}\n  label_smoothing: on\neval:\n  sizs: 3\n"
    overrides = ["seed=x", "nonsense", "algorithms.mixup.alpha=", "max_duration=2ep", "algorithms.swa=on"]
    lines = errors(tmp_path, text, *overrides)
    wrong = [f"{override!r} on the command line" for override in overrides if override != "max_duration=2ep"]
    assert {line.split(": ")[0] for line in lines} == {"base.yaml:5", "a.yaml:3", "a.yaml:6", *wrong}
    assert any("interpolate_loss" in line for line in lines)


def test_what_is_missing_is_asked_for_once(tmp_path):
    lines = errors(tmp_path, "seed: 3\n")
    assert [line.split("; ")[0] for line in lines] == ["a.yaml: run_name: missing", "a.yaml: data: missing"]
    (line,) = errors(tmp_path, "run_name: a\ndata: {path: x}\n")
    assert line == "a.yaml: device_batch_size: missing; set it, or global_batch_size"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.yaml: got nothing;"),
        ("- a\n- b\n", "a.yaml: got ['a', 'b'];"),
        ("seed: 1\nseed: 2\n", "a.yaml:2: seed: given twice, first at line 1"),
        ("seed: [1\n", "a.yaml:2: not valid YAML: "),
        ("data:\n\tpath: x\n", "a.yaml:2: not valid YAML: while scanning for the next token found character"),
        ("a: 1\n---\nb: 2\n", "a.yaml:2: not valid YAML: expected a single document in the stream but found another"),
        (b"run_name: ok\npath: \xff\xfe\n", "a.yaml:2: not UTF-8 text"),
        ("seed: !!python/name:os.system\n", "a.yaml:1: seed: the tag"),
        ('data: {path: "a\\0b"}\n', "a.yaml:1: data.path: holds a control character"),
        ("run_name: \x01\n", "a.yaml: not valid YAML: unacceptable character #x0001"),
        ("? [a, b]\n: 3\n", "a.yaml:1: a key must be a word or a number"),
        ("a: *nobody\n", "a.yaml:1: not valid YAML: found undefined alias"),
        ("a: &x [*x]\n", "nested more than 40 levels deep"),
        ("x: " + "[" * 90_000, "a.yaml: more than 4,000 lists and mappings"),
        ("- " * 45_000, "a.yaml: more than 4,000 lists and mappings"),
        ("x: " + "[" * 60 + "]" * 60, "a.yaml:1: nested more than 40 levels deep"),
        ("x: " + "9" * 5000, "is not a valid int"),
        ("a: 1\n" * 30_000, "larger than 100,000 bytes"),
    ],
)
def test_what_is_not_a_config_is_reported_in_one_line(text, message, tmp_path):
    (line,) = errors(tmp_path, text)
    assert message in line
    assert line.startswith("a.yaml")


@pytest.mark.parametrize("member", ["*{}", "{{<<: *{}}}", "{{<<: [*{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}]}}"])
def test_a_billion_laughs_are_refused_at_once(member, tmp_path):
    lines = ["a: &a {x: [x, x, x, x, x, x, x, x, x, x]}"]
    for old, new in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{new}: &{new} {{{', '.join(f'{key}: {member.format(old)}' for key in 'pqrstuvwxy')}}}")
    (line,) = errors(tmp_path, "\n".join(lines))
    assert line == "a.yaml: more than 10,000 values once its aliases are written out"


def test_files_that_are_not_there_are_answered_with_the_nearest(tmp_path, monkeypatch):
    write(tmp_path, LEAST, "medium.yaml")
    monkeypatch.chdir(tmp_path)
    for name, message in {
        "medum.yaml": "medum.yaml: no such file or directory; did you mean 'medium.yaml'?",
        "zzz.yaml": "zzz.yaml: no such file or directory",
        "medium.yaml/x": "medium.yaml/x: not a directory",
        ".": ".: not a regular file",
        "/dev/null": "/dev/null: not a regular file",
    }.items():
        with pytest.raises(InputError) as caught:
            load_config(Path(name))
        assert caught.value.lines == (message,)
    with pytest.raises(InputError, match=r"^a\\x00b: .*embedded null"):  # the rest is Python's own, and changes
        load_config(Path("a\0b"))


def test_the_words_of_yaml_1_1_mean_what_they_say(tmp_path):
    text = """
run_name: 2024-01-01
seed: 017
device_batch_size: 1_024
data: {path: on, augment: {flip: .5, color_jitter: on, random_erasing: off}}
optimizer: {lr: 1e-3, nesterov: off}
compile: on
model: {zero_init_residual: No}
algorithms: {blurpool: on, channels_last: Yes, mixup: true, cutmix: off, ema: no}
"""
    config = load(tmp_path, text)
    assert (config.run_name, config.seed, config.device_batch_size) == ("2024-01-01", 17, 1024)
    data, techniques = config.data, config.algorithms
    assert (data.path, data.augment.flip, config.optimizer.lr) == ("on", 0.5, 1e-3)
    assert (config.optimizer.nesterov, config.model.zero_init_residual, config.compile) == (False, False, True)
    assert None not in (data.augment.color_jitter, techniques.blurpool, techniques.channels_last, techniques.mixup)
    assert {data.augment.random_erasing, techniques.cutmix, techniques.ema} == {None}


def test_anchors_and_merge_keys(tmp_path):
    text = LEAST + "algorithms:\n  mixup: &mix {alpha: 0.3}\n  cutmix: {<<: *mix, switch_prob: 0.1}\n"
    algorithms = load(tmp_path, text).algorithms
    assert (algorithms.mixup.alpha, algorithms.cutmix.alpha, algorithms.cutmix.switch_prob) == (0.3, 0.3, 0.1)
    text = LEAST + "algorithms:\n  mixup: &mix {alpha: 0.3}\n  cutmix: {<<: [{alpha: 0.9}, *mix], switch_prob: 0.1}\n"
    assert load(tmp_path, text).algorithms.cutmix.alpha == 0.9


def test_a_profile_lies_over_its_base(tmp_path):
    base = """scheduler: {name: one_cycle, warmup: 0.2, div_factor: 10}
algorithms: {mixup: {alpha: 0.4}, ema: {half_life: 5ba}}
eval: {sizes: [224, 288], interval: 3}
"""
    profile = """base: deeper/base.yaml
scheduler: {name: cosine}
eval: {sizes: [32]}
algorithms: {ema: off, mixup: on}
device_batch_size: {128: 3, 224: 4}
"""
    (tmp_path / "deeper").mkdir()
    write(tmp_path, LEAST + base, "deeper/base.yaml")
    config = load(tmp_path, profile, "data.workers=0", "device_batch_size.224=5")
    assert config.scheduler == CosineConfig()
    assert (config.eval.sizes, config.eval.interval) == ((32,), 3)
    assert (config.algorithms.mixup.alpha, config.algorithms.ema) == (0.4, None)
    assert config.device_batch_size == {128: 3, 224: 5}
    assert config.data.model_dump(include={"path", "workers"}) == {"path": "images", "workers": 0}
    config = load(tmp_path, profile, "algorithms.ema=on", "algorithms.ema.half_life=7ba")
    assert config.algorithms.ema.half_life == "7ba"


def test_a_section_chosen_by_name_inherits_from_its_own_kind_only(tmp_path):
    assert load(tmp_path, LEAST, "scheduler.warmup=0.5").scheduler.name == "one_cycle"
    assert load(tmp_path, LEAST + "scheduler: {div_factor: 3}", "scheduler.name=cosine").scheduler.warmup == 0.05
    config = load(tmp_path, LEAST + "scheduler: {div_factor: 3}", "scheduler.name=one_cycle")
    assert config.scheduler.div_factor == 3


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("a.yaml", "a.yaml:1: base: the base of a.yaml must not have a base of its own"),
        ("based.yaml", "based.yaml:1: base: the base of a.yaml must not have a base of its own"),
        ("medum.yaml", "a.yaml:1: base: medum.yaml: no such file or directory; did you mean 'medium.yaml'?"),
        ("[x]", "a.yaml:1: base: got ['x']; allowed: a YAML file, its path from this one's folder"),
        ("", "a.yaml:1: base: got nothing; allowed: a YAML file, its path from this one's folder"),
        ("broken.yaml", "a.yaml:1: base: broken.yaml:1: seed: given twice, first at line 1"),
    ],
)
def test_a_base_that_cannot_be_one(base, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, LEAST, "medium.yaml")
    write(tmp_path, "base: a.yaml\n", "based.yaml")
    write(tmp_path, "{seed: 1, seed: 2}", "broken.yaml")
    Path("a.yaml").write_text(f"base: {base}\nrun_name: a\n")
    with pytest.raises(InputError) as caught:
        load_config("a.yaml")
    assert caught.value.lines == (message,)  # not what the base might have held


def test_overrides_are_written_as_in_the_yaml(tmp_path):
    text = LEAST + "algorithms: {mixup: {}, ema: {half_life: 5ba}}\n"
    overrides = """algorithms.mixup=off|algorithms.ema.half_life=200ba|eval.sizes=[224,288]|optimizer.lr=1e-3|run_name=7
        |device_batch_size={128: 256, 224: 128}|data.path=a: b # c|checkpoints.folder={runs_folder}/there|seed=1|seed=2
        |algorithms.composer.CutOut={num_holes: 2}|resume=null"""
    config = load(tmp_path, text, *(line.strip() for line in overrides.split("|")))
    assert config.algorithms.mixup is None
    assert config.algorithms.ema.half_life == "200ba"
    assert config.eval.sizes == (224, 288)
    assert config.device_batch_size == {128: 256, 224: 128}
    assert (config.optimizer.lr, config.run_name, config.seed, config.resume) == (1e-3, "7", 2, None)
    assert (config.data.path, config.checkpoints.folder) == ("a: b # c", "{runs_folder}/there")
    assert config.algorithms.composer == {"CutOut": {"num_holes": 2}}
    config = load(tmp_path, LEAST + "algorithms: {composer: {CutOut: on}}", "algorithms.composer.CutOut=off")
    assert config.algorithms.composer == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "an override is key.path=value"),
        ("seed=", "an override is key.path=value"),
        ("base=x.yaml", "base: can be set in the YAML file only"),
        ("eval.sizes=[1", "not valid YAML"),
        ("optimizer.lr.x.y=3", "optimizer.lr: got {'x': {'y': 3}}; allowed: a number above 0"),
    ],
)
def test_a_wrong_override_is_quoted(override, message, tmp_path):
    (line,) = errors(tmp_path, LEAST, override)
    assert line.startswith(f"{override!r} on the command line: {message}")


def test_the_digest_counts_what_changes_the_weights(tmp_path):
    plain = load(tmp_path, LEAST)
    unrelated = ["run_name=b", "runs_folder=x", "device=cpu", "autoresume=false", "data.path=y", "loggers.interval=3"]
    same = load(tmp_path, LEAST, *unrelated)
    other = load(tmp_path, LEAST, "precision=amp_fp16", "algorithms.mixup=on", "device_batch_size={32: 8}")
    assert config_digest(same) == config_digest(plain)
    assert config_digest(other) != config_digest(plain)
    # As before the keys that were added since, at 94fdd79: their defaults do not count, or no run could resume.
    assert config_digest(plain).startswith("86c8c0ddff081c3d"), "a new key must be in ADDED_LATER (recipes/resolved.py)"
    mixed = load(tmp_path, LEAST, "scheduler.name=cosine", "algorithms.mixup=on")
    assert config_digest(mixed).startswith("e42dafdde497a30e")
    # Optional fields of the first techniques count, whether they are set or not, as at 714ac94.
    techniques = load(tmp_path, LEAST, "algorithms.ema.half_life=10ba", "algorithms.randaugment=on")
    assert config_digest(techniques).startswith("8c565bbc2d90ba15")
    dumps = [config.model_dump(mode="json") for config in (plain, same, other)]
    assert differing_keys(dumps[0], dumps[1]) == []
    assert differing_keys(dumps[0], dumps[2]) == [
        "algorithms.mixup: here null, there unset",
        "algorithms.mixup.alpha: here unset, there 0.2",
        "algorithms.mixup.interpolate_loss: here unset, there false",
        "global_batch_size: here 8, there unset",
        "global_batch_size.32: here unset, there 8",
        'precision: here "fp32", there "amp_fp16"',
    ]
    assert differing_keys({**dumps[0], "new": 1}, dumps[0]) == ["new: here 1, there unset"]
    assert differing_keys(dumps[0], dumps[0], 1, 2) == ["global_batch_size: here 8, there 16"]
    # It counts the global batch, not the devices.
    by_device = load(tmp_path, LEAST, "device_batch_size={32: 8, 64: 4}")
    by_all = load(tmp_path, LEAST, "device_batch_size=null", "global_batch_size={32: 16, 64: 8}")
    assert config_digest(by_device, 2) == config_digest(by_all, 4) == config_digest(by_all, 1)
    assert config_digest(by_device, 2) != config_digest(by_device, 1)
