"""A profile is data: what the named ones hold, which values a field takes, what a table changes."""

import dataclasses
import hashlib
import subprocess
import sys

import pytest

from lgap_utils import profiles
from lgap_utils.profiles import AUTHORS, PAPER, PROFILES, SMALL, TOY, get_profile

# ---------------------------------------------------------------- the named ones

# sha256 of all fields, values and types, of a profile and of its Tables 1 to 4. Stored rows belong to them.
DIGESTS = {
    "toy": "7010b846c0a87c75 d2805c7d38be0506 cba0c7e110fb442d cba0c7e110fb442d d36346f63e62f436",
    "small": "88894a6cbd449cc9 88894a6cbd449cc9 244e5ab03b434db1 88894a6cbd449cc9 235099cd499335b7",
    "paper": "9b9552d37fdf848a 9b9552d37fdf848a 4da85d521a3e82ee 8bf42614fb74fc43 a075b53b7c131aac",
    "authors": "ba825aec3eb9767d ba825aec3eb9767d fcfa223bf784baac a08d1685f47e7a42 c355919714269cbb",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_every_field_of_every_table_is_what_it_was(name):
    digests = []
    for table in (None, 1, 2, 3, 4):
        fields = repr(dataclasses.asdict(get_profile(name, table)))
        digests.append(hashlib.sha256(fields.encode()).hexdigest()[:16])
    assert digests == DIGESTS[name].split()


def test_the_profiles_have_names():
    assert list(PROFILES) == list(DIGESTS) and [TOY, SMALL, PAPER, AUTHORS] == list(PROFILES.values())
    assert all(profile.name == name for name, profile in PROFILES.items())


def test_every_table_of_the_paper_is_there():
    datasets = [get_profile("paper", table).dataset for table in (None, 1, 2, 3, 4)]
    assert datasets == ["cifar10", "cifar10", "cifar100", "cifar10", "imagenet"]
    assert get_profile("authors", 4).rivals == (
        ("Salman et al.", "robustbench:imagenet/Linf/Salman2020Do_R50", None),
        ("Wong et al.", "robustbench:imagenet/Linf/Wong2020Fast", 288),
    )


def test_the_authors_preset_is_the_paper_with_departures_that_can_be_taken_back_one_by_one():
    paper, authors = dataclasses.asdict(PAPER), dataclasses.asdict(AUTHORS)
    departures = {field for field in paper if paper[field] != authors[field]} - {"name", "about", "tables"}
    assert departures == set(
        "vae_input antialias dtype eps_255 step_size_255 masked_bpda eot_average n_eot finetune_lr "
        "finetune_epochs finetune_batch seed".split()
    )
    assert AUTHORS.eps == 8 / 256 and AUTHORS.step_size == 2 / 256
    assert get_profile("authors", 3).eps == 8 / 255 and get_profile("authors", 2).n_images == 8160
    one_back = dataclasses.asdict(get_profile("authors", antialias=True))
    assert {field for field in authors if authors[field] != one_back[field]} == {"antialias"}


def test_reading_the_profiles_loads_no_heavy_library():
    script = "import sys, lgap_utils.profiles; print({'torch', 'numpy', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=profiles.ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


# ---------------------------------------------------------------- one profile, changed


def test_overrides_replace_and_none_keeps():
    profile = get_profile("paper", n_images=7, seed=None)
    assert profile.n_images == 7 and profile.seed == PAPER.seed
    assert profile.eps == 8 / 255 and profile.step_size == 2 / 255


def test_unknown_names_are_refused_with_the_choices():
    says = r"no profile 'tiny'; choose from \['authors', 'paper', 'small', 'toy'\]"
    with pytest.raises(ValueError, match=says):
        get_profile("tiny")
    with pytest.raises(ValueError, match="no field epsilon; choose from .*'eps_255'"):
        get_profile("toy", epsilon=8)


@pytest.mark.parametrize("table", ["2", 5, 0, -1, True, 2.0, [2]])
def test_a_table_that_the_paper_has_not_is_refused(table):
    with pytest.raises(ValueError, match=r"no table .*; choose from \[1, 2, 3, 4\]"):
        get_profile("paper", table)


@pytest.mark.parametrize(
    "other, compared",
    [
        ({}, True),
        ({"eps_255": 4}, False),
        ({"diffusion": "/models/sd"}, False),
        ({"n_finetune": 1}, False),
        ({"eps_255": 8.0, "strength": 0.5}, True),
        ({"n_images": 7, "seed": 1}, True),
        ({"eps_255": 4, "same_models": True}, True),
    ],
)
def test_a_number_under_other_settings_is_not_compared_with_the_papers(other, compared):
    assert get_profile("paper", 1, **other).same_models == compared


@pytest.mark.parametrize(
    "variable, root, default",
    [("LGAP_DATA", profiles.data_root, "data"), ("LGAP_OUTPUTS", profiles.output_root, "outputs")],
)
def test_folders_are_the_checkouts_or_what_a_variable_says(monkeypatch, tmp_path, variable, root, default):
    monkeypatch.delenv(variable, raising=False)
    assert root() == profiles.ROOT / default
    monkeypatch.setenv(variable, "")
    assert root() == profiles.ROOT / default
    monkeypatch.setenv(variable, str(tmp_path))
    assert root() == tmp_path
    monkeypatch.setenv("LGAP_OUTPUTS", str(tmp_path))
    assert TOY.outputs == tmp_path / "toy" and TOY.finetuned == tmp_path / "toy" / "classifier_toy"


def test_downloads_go_where_the_hub_wants_them_or_where_a_variable_says(monkeypatch):
    monkeypatch.delenv("LGAP_CACHE", raising=False)
    assert profiles.cache_root() is None
    monkeypatch.setenv("LGAP_CACHE", "~/elsewhere")
    assert profiles.cache_root().endswith("/elsewhere") and "~" not in profiles.cache_root()


# ---------------------------------------------------------------- values of fields

NAN, INF = float("nan"), float("inf")
BAD = {
    "eps_255": [-1, NAN, "8/255", 256, True, INF, None],
    "step_size_255": [-2],
    "strength": [1.5, "half", 0],
    "guidance_scale": [-1, 0.9, 101, True],
    "finetune_lr": [NAN, 2],
    "n_steps": [0, 2.0, "40"],
    "n_images": [0, True],
    "size": [7, 0, 33, 36],
    "max_length": [1, 5],
    "min_length": [-1, 21],
    "time_grid": ["ddpm", 1],
    "antialias": [1, None],
    "needs_gpu": ["no"],
    "vae_sample": ["no"],
    "prompt": [7],
    "classifier": [None],
    "dataset": ["mnist"],
    "dtype": ["half"],
    "variant": ["fp32"],
    "vae_input": ["raw"],
    "eot_average": ["mean"],
    "finetune_schedule": ["linear"],
    "captioner_revision": ["main", "", 40 * "g"],
    "diffusion_revision": [7],
    "seed": [-1],
}
for name in (
    "batch_size",
    "num_inference_steps",
    "num_beams",
    "n_eot",
    "autoattack_block",
    "n_draws",
    "n_full",
):
    BAD[name] = [0]


@pytest.mark.parametrize("field, value", [(field, value) for field in BAD for value in BAD[field]])
def test_a_profile_refuses_a_bad_value_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(TOY, **{field: value})


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"size": 33}, "size=33: expected a multiple of 8"),
        (
            {"max_length": 4},
            "max_length=4: expected at least 6, .* after the 3 words of the prompt 'a picture of'",
        ),
        ({"prompt": "a " * 30}, "max_length=20: expected at least 33"),
        ({"min_length": 21}, "min_length=21: expected at most max_length=20"),
        ({"guidance_scale": 0}, "guidance_scale=0: expected at least 1.*at 0 the caption is ignored"),
        ({"guidance_scale": 0.9}, "guidance_scale=0.9: .*between 0 and 1 it counts less"),
        ({"guidance_scale": 101}, "expected 1 to 100"),
        ({"guidance_scale": True}, "guidance_scale=True: expected a number"),
        ({"strength": "half"}, "strength='half': expected a number, e.g. strength=0.5"),
        ({"n_steps": 2.0}, "n_steps=2.0: expected a whole number"),
        ({"dtype": "half"}, r"dtype='half': choose from \['float32', 'bfloat16', 'float16'\]"),
        ({"antialias": 1}, r"antialias=1: choose from \[False, True\]"),
        (
            {"captioner_revision": "main"},
            "captioner_revision='main': expected a commit, 40 hexadecimal digits",
        ),
        ({"strength": 0.1, "num_inference_steps": 4}, "gives 0 denoising steps; expected 1 to 4"),
        ({"strength": 1.0, "time_grid": "compvis"}, "gives 6 denoising steps; expected 1 to 5"),
    ],
)
def test_what_is_wrong_with_a_value_is_said(settings, says):
    with pytest.raises(ValueError, match=says):
        get_profile("toy", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 40},
        {"max_length": 6},
        {"max_length": 3, "prompt": "", "min_length": 3},
        {"guidance_scale": 1},
        {"guidance_scale": 100.0},
        {"min_length": 20},
        {"eps_255": 0, "step_size_255": 255, "min_length": 0, "seed": 0},
        {"captioner_revision": 40 * "a"},
    ],
)
def test_settings_at_their_bounds_are_taken(settings):
    profile = get_profile("toy", **settings)
    assert {name: getattr(profile, name) for name in settings} == settings
