"""What the doctor says of data agrees with what the loader does."""

import pytest
from fake_data_sets import both, cifars, imagenet_folder  # noqa: F401 - fixtures

from lgap_utils.data import CIFARS, at_hand, load_images
from lgap_utils.profiles import get_profile
from tools import needs

SPOILT = {
    "whole": (lambda file: None, True),
    "empty": (lambda file: file.write_bytes(b""), False),
    "no image or table": (lambda file: file.write_text("<html>Not found</html>"), False),
    "a link to nothing": (lambda file: (file.unlink(), file.symlink_to("nowhere")), False),
}


def profile(dataset, n_images=1):
    """One that asks for few images of a data set, and of no other."""
    return get_profile("small", dataset=dataset, n_images=n_images, n_finetune=1)


@pytest.mark.parametrize("spoil, fine", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "imagenet"])
def test_the_doctor_and_what_is_at_hand_agree_with_the_loader(cifars, imagenet_folder, dataset, spoil, fine):  # noqa: F811
    folder, names = imagenet_folder
    file = folder / names[0] if dataset == "imagenet" else cifars[0][dataset]
    spoil(file)
    assert at_hand(dataset) == fine
    (found,) = needs.data_sets([profile(dataset)])
    if fine:
        assert len(load_images(dataset, "test", 1)) == 1
        assert isinstance(found, needs.Item) and not found.absent
        return
    with pytest.raises((FileNotFoundError, ValueError), match=str(file)):
        load_images(dataset, "test", 1)
    if isinstance(found, needs.Item):
        assert CIFARS[dataset].file.format("test") in found.absent
    else:
        assert found.state == "missing" and str(file) in found.detail
        assert "the profile asks" not in found.detail


@both
def test_too_few_images_are_told_with_the_number_that_the_profile_asks_for(cifars, dataset):  # noqa: F811
    (check,) = needs.data_sets([profile(dataset, n_images=11)])
    assert check.state == "missing" and "it has 10" in check.detail and "asks for 11 images" in check.detail


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "imagenet"])
def test_a_folder_of_data_that_does_not_exist_is_named(tmp_path, monkeypatch, dataset):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setenv("LGAP_DATA", str(tmp_path / "dta"))
    (check,) = needs.data_sets([profile(dataset)])
    assert check.state == "missing" and f"LGAP_DATA={tmp_path / 'dta'}: there is no folder" in check.detail


@both
def test_an_archive_that_is_not_unpacked_is_told(tmp_path, monkeypatch, dataset):
    from torchvision import datasets

    monkeypatch.setenv("LGAP_DATA", str(tmp_path))
    (tmp_path / getattr(datasets, dataset.upper()).filename).touch()
    (check,) = needs.data_sets([profile(dataset)])
    assert check.state == "missing" and "is not unpacked" in check.detail
