"""Reading and writing run configurations: strict types, named places, exact round trips."""

import string
from contextlib import suppress
from dataclasses import fields
from typing import Any, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tare.core.errors import InputError
from tare.train.config import DataConfig, MethodConfig, ModelConfig, RunConfig, RunSection, TrainConfig
from tare.train.configfile import PATHS, SECTIONS, build, dump, flag, load, loads, read
from tare.train.settings import kind_of

TRICKY = ["1e-3", "no", "null", "~", "010", "1.10", "12:30:00", "0x10", "true", ".inf", "- a", "a: b", "#x", "é"]
TRICKY += ["2026-01-01", "1_0", "0o7", "=", "<<", "1e3", "-", "'", '"', "a\u00a0b"]
TEXTS = st.sampled_from(TRICKY) | st.text(
    st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1
).filter(str.strip)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
KEYS = st.text(string.ascii_lowercase, min_size=1).filter(
    lambda key: key not in ("lr", "rank", "weight_decay", "release", "storage")
)
SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "run.device": st.sampled_from(["auto", "cpu", "cuda", "cuda:3"]),
    "run.budget": st.none(),
    "model.quantize": st.sampled_from([None, "int4", "int8:group=none", "int4:group=32"]),
    "adapter.kind": st.just("lora"),  # the others refuse some of the settings below
    "adapter.targets": st.sampled_from([None, "q_proj", "q_proj, v_proj", "all-linear"]),
    "adapter.tokens": st.none(),
    "train.warmup": st.floats(0, 1, exclude_max=True) | st.just(1.0),
}


def values(section: type, name: str) -> st.SearchStrategy[Any]:
    """All values that a field accepts."""
    title = section.title  # type: ignore[attr-defined]
    if (path := f"{title}.{name}") in SPECIAL:
        return SPECIAL[path]
    kind, optional = kind_of(section, name)
    if get_origin(kind) is not None and kind != dict[str, Any]:
        found: st.SearchStrategy[Any] = st.sampled_from(get_args(kind))
    elif kind is float:
        found = st.floats(1e-12, 0.99)
    elif kind is int:
        found = st.integers(4, 2**40)  # no lower bound of a setting is above that
    else:
        found = {bool: st.booleans(), str: TEXTS}.get(kind, st.dictionaries(KEYS, PLAIN, max_size=3))
    return found | st.none() if optional else found


CONFIGS = st.builds(
    RunConfig,
    **{
        title: st.builds(section, **{spec.name: values(section, spec.name) for spec in fields(section)})
        for title, section in SECTIONS.items()
    },
)


@settings(max_examples=150, deadline=None)
@given(CONFIGS)
def test_dump_and_load_is_the_identity(config: RunConfig) -> None:
    assert build(loads(dump(config))) == config


@settings(max_examples=50, deadline=None)
@given(CONFIGS)
def test_other_yaml_readers_see_the_same_texts(config: RunConfig) -> None:
    sections = yaml.safe_load(dump(config))
    assert sections["model"]["name"] == config.model.name
    assert sections["data"]["source"] == config.data.source


@settings(max_examples=300, deadline=None)
@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_any_text_gives_a_config_or_a_typed_error(text: str) -> None:
    with suppress(InputError):
        build(loads(text))


def test_an_empty_section_list_means_defaults_only_when_something_is_given() -> None:
    assert build([]) == RunConfig()
    assert build(loads("train:\n  steps: 7\n")).train == TrainConfig(steps=7)


def test_flags_win_over_the_file() -> None:
    config = build(loads("train: {steps: 7, batch: 3}"), [flag("train.steps", "9", "--steps")])
    assert (config.train.steps, config.train.batch) == (9, 3)


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("train.steps", "1_000", 1000),
        ("method.lr", "1e-3", 1e-3),
        ("train.clip", "none", None),
        ("model.checkpointing", "true", True),
        ("data.source", "010", "010"),
        ("train.precision", "bf16-autocast", "bf16-autocast"),
    ],
)
def test_a_flag_is_read_by_the_type_of_its_field(path: str, text: str, value: object) -> None:
    section, name = path.split(".")
    assert getattr(getattr(build([flag(path, text, f"--{path}")]), section), name) == value


def test_every_field_can_be_given_as_a_flag() -> None:
    for path in PATHS:
        assert flag(path, "1", "--x").path == path


def test_options_are_merged_key_by_key() -> None:
    extra = [flag("method.options.scale", "0.25", "--a"), flag("method.options.betas", "[0.9, 0.95]", "--b")]
    config = build(loads("method: {options: {period: 50, scale: 1.0}}"), extra)
    assert config.method.options == {"period": 50, "scale": 0.25, "betas": [0.9, 0.95]}


def test_environment_is_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "42")
    assert build(loads("run:\n  out: $SECRET/${SECRET}")).run.out == "$SECRET/${SECRET}"


BAD_TEXTS = [
    ("", "empty; expected sections model, data"),
    ("# nothing\n", "empty"),
    ("5", "expected a mapping with sections .* got 5"),
    ("train", "expected a mapping with sections"),
    ("train:\n", "line 1: train: expected a mapping of settings, got nothing"),
    ("train: [1]", "train: expected a mapping of settings, got a list"),
    ("train: {steps: 1.5}", r"train\.steps: expected a whole number >= 1, got 1\.5"),
    ("train: {steps: true}", r"train\.steps: expected a whole number >= 1, got true"),
    ("train: {steps: null}", r"train\.steps: .* got nothing"),
    ("train:\n  steps: 0", r"line 2: train\.steps: .* got 0"),
    ("train: {steps: 010}", "got '010'"),
    ("train: {batch: -1}", r"train\.batch"),
    ('method: {lr: "1e-3"}', r"method\.lr: expected a number > 0, or none, got '1e-3' \(a text; remove the quotes\)"),
    ("method: {lr: .nan}", r"method\.lr: .* got nan"),
    ("method: {lr: 1e999}", r"method\.lr: .* got inf"),
    ("method: {lr: .inf}", r"method\.lr: .* got inf"),
    ("method: {lr: -0.1}", r"method\.lr"),
    ("method: {rank: 0}", r"method\.rank"),
    ("method: {options: {x: .nan}}", r"method\.options: .* finite"),
    ("method: {options: {lr: 1}}", r"method\.options\.lr: conflicts with method\.lr"),
    ("model: {checkpointing: no}", r"model\.checkpointing: expected true or false, got 'no'"),
    ("model: {name: 7}", r"model\.name: expected text, got 7 \(put it in quotes\)"),
    ('model: {name: ""}', r"model\.name: expected text, got ''"),
    ('model: {name: "a\\nb"}', r"model\.name"),
    ("train: {warmup: 500}", r"train\.warmup: expected at most train\.steps = 400"),
    ("train: {warmup: 1.5}", r"train\.warmup: expected a share < 1 or a whole number"),
    ("train: {schedule: cosin}", r"train\.schedule: .*did you mean 'cosine'"),
    ("run: {device: gpu}", r"run\.device: expected auto, cpu"),
    ("model: {quantize: int3}", r"model\.quantize: expected int4 or int8"),
    ("train: {workers: all}", r"train\.workers: expected one of points, data, or none, got 'all'"),
    ("train: {step: 5}", r"train\.step: unknown setting \(did you mean 'steps'\?\); allowed: steps, batch"),
    ("train: {lr: 5}", r"train\.lr: unknown setting \(did you mean 'method\.lr'\?\)"),
    ("train: {epochs: 2}", r"train\.epochs: unknown setting; allowed: steps"),
    ("trian: {steps: 5}", r"trian: unknown section \(did you mean 'train'\?\); allowed: model, data"),
    ("steps: 5", r"steps: unknown section \(did you mean 'train\.steps'\?\)"),
    ("train:\n  steps: 5\n  steps: 6", "line 3: 'steps' is given twice"),
    ("train: {steps: 5}\ntrain: {batch: 1}", "line 2: 'train' is given twice"),
    ("train: {steps: 5", "line 1: not valid YAML"),
    ("a: b: c", "line 1: not valid YAML"),
    ("train:\n\tsteps: 5", "line 2: not valid YAML"),
    ("train: {steps: 5}\n---\ntrain: {steps: 6}", "not valid YAML"),
    ("train: {steps: !!python/object/apply:os.system ['true']}", "tags such as .* are not allowed"),
    ("!!python/object:os.x {}", "expected a mapping|tags such as"),
    ("train: {? [1, 2] : 3}", "a key must be a plain word"),
    ("a: &a {b: *a}", "not valid YAML|unknown|nested"),
    ("method: {options: &o {x: *o}}", "too deeply|nested"),
    ("[" * 5000, "nested|not valid YAML"),
    ("train: \x00", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "pattern"), BAD_TEXTS)
def test_a_bad_file_is_named_with_its_place(text: str, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        build(loads(text, "run.yaml"))
    assert "\n" not in str(caught.value)


def test_an_alias_bomb_is_refused_quickly() -> None:
    lines = ["method:", "  options:", "    a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"    a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(InputError, match="too many"):
        loads("\n".join(lines))


def test_bad_files(tmp_path: Any) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml: no such file"):
        read(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="is a folder"):
        read(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("model: {name: é}".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin.yaml: not UTF-8 text \(byte 14\)"):
        read(tmp_path / "latin.yaml")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbftrain: {steps: 3}\r\n")
    assert load(tmp_path / "bom.yaml").train.steps == 3
    (tmp_path / "big.yaml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(InputError, match="larger than"):
        read(tmp_path / "big.yaml")


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ([("train.steps", "5", "--steps"), ("train.steps", "6", "--train.steps")], r"--train\.steps: conflicts with"),
        ([("train.stps", "5", "--x")], r"--train\.stps: unknown setting \(did you mean 'steps'\?\)"),
        ([("train.steps.x", "5", "--x")], "unknown setting"),
        ([("trin.steps", "5", "--x")], "unknown section"),
        ([("train.steps", "many", "--steps")], "--steps: expected a whole number >= 1, got 'many'"),
        ([("train.steps", "none", "--steps")], "--steps: .* got 'none'"),
        ([("method.lr", "nan", "--lr")], "--lr: expected a number > 0, or none, got 'nan'"),
        ([("train.clip", "-1", "--clip")], "--clip: .* got -1"),
    ],
)
def test_bad_flags_are_named_as_they_were_written(flags: list[tuple[str, str, str]], pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        build([flag(*each) for each in flags])


def test_the_same_value_twice_is_no_conflict() -> None:
    flags = [flag("train.steps", "5", "--steps"), flag("train.steps", "5", "--train.steps")]
    assert build(flags).train.steps == 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: TrainConfig(steps=0),
        lambda: TrainConfig(batch=True),
        lambda: TrainConfig(warmup=float("nan")),
        lambda: MethodConfig(lr=float("inf")),
        lambda: DataConfig(seq=1),
        lambda: DataConfig(eval_fraction=1.0),
        lambda: ModelConfig(name=""),
        lambda: RunSection(seed=-1),
    ],
)
def test_the_dataclasses_check_themselves(make: Any) -> None:
    with pytest.raises(InputError, match=r"^(model|data|method|train|run)\.\w+: expected"):
        make()


def test_tuples_become_lists_as_in_yaml() -> None:
    assert MethodConfig(options={"betas": (0.9, 0.99)}).options == {"betas": [0.9, 0.99]}
