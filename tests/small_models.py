"""Small models in the layout of the hub's cache and of RobustBench, for tests of the profile `paper`."""

import shutil
import socket
from pathlib import Path

from lgap_utils import zoo
from lgap_utils.files import sha256


def in_cache(cache, repository, revision, folder):
    """`folder` as huggingface_hub keeps a snapshot: blobs named by digest, links to them, and a reference."""
    root = Path(cache) / f"models--{repository.replace('/', '--')}"
    for file in (p for p in folder.rglob("*") if p.is_file()):
        link, blob = root / "snapshots" / revision / file.relative_to(folder), root / "blobs" / sha256(file)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(blob)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(revision)
    return root / "snapshots" / revision


def small_network(dataset, threat, model):
    """A small network of the class of RobustBench's entry, as the real ones are too slow for a test."""
    if dataset == "cifar10":
        return zoo.new_wide_resnet(10, 1, 10)
    from torchvision.models.resnet import BasicBlock, ResNet

    zoo.import_robustbench()
    from robustbench.model_zoo.architectures.utils_architectures import normalize_model

    return normalize_model(ResNet(BasicBlock, [1, 1, 1, 1]), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def install():
    """From here on RobustBench's networks are small, and no connection leaves the machine."""
    zoo.robustbench_network = small_network
    connect = socket.socket.connect

    def local_only(self, address):
        if isinstance(address, tuple) and not str(address[0]).startswith("127."):
            raise OSError(f"a test tried to reach {address[0]}")
        return connect(self, address)

    socket.socket.connect = local_only
