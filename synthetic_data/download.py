"""Download CIFAKE, for `main_train_cifar10.py --download_synthetic`."""

import os
import shutil
import tempfile
from pathlib import Path

from data import BY_HAND, CIFAKE, visible
from experiment.errors import UserError


def download_cifake(folder: str | Path) -> None:
    """Download CIFAKE with the optional kagglehub and copy its train/FAKE to `folder`.

    A folder that is not empty is left as it is. Errors: UserError, OSError.
    """
    target = Path(folder).resolve()  # a link may lead to another disk
    if visible(target):
        return
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{folder} holds only hidden files: delete them, or name another folder")
    try:
        import kagglehub

        fake = (Path(kagglehub.dataset_download(CIFAKE)) / "train" / "FAKE").resolve(strict=True)
    except Exception as error:  # kagglehub lets the errors of the HTTP libraries below it through
        needs = "--download_synthetic needs `pip install kagglehub` and a network; or, by hand"
        raise UserError(f"no CIFAKE ({error}): {needs}, {BY_HAND} {folder}") from error
    for path in fake.iterdir():
        if path.is_symlink() or not path.is_file():
            raise UserError(f"the downloaded {path} is not a plain file")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as private:
        copy = shutil.copytree(fake, Path(private, "FAKE"))
        if target.is_dir():  # an empty one, which Windows does not replace
            target.rmdir()
        os.replace(copy, target)
