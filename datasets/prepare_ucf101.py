"""Arrange UCF-101 for training: the official archive and split lists to <out>/{train,test}/<class>/<clip>.avi.

    python datasets/prepare_ucf101.py --videos UCF101.rar --lists UCF101TrainTestSplits-RecognitionTask.zip
    python datasets/prepare_ucf101.py --videos UCF-101/ --lists ucfTrainTestlist/ --split 2

Clips are linked, not copied, unless --copy says so. Run again, it only adds what is missing.
"""

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from EqM import cli
from EqM.run.errors import UserError

EXTRACTORS = {
    "bsdtar": ["-xf", "{archive}", "-C", "{folder}"],
    "unrar": ["x", "-idq", "-o+", "{archive}", "{folder}/"],
    "7z": ["x", "-y", "-bso0", "-o{folder}", "{archive}"],
}


def find_clips(folder):
    """Paths of the .avi files under a folder, by file name in lower case.

    The lists write v_HandStandPushups_g01_c01.avi, the archive v_HandstandPushups_g01_c01.avi.
    """
    clips = {path.name.lower(): path for path in sorted(folder.rglob("*.avi"))}
    if not clips:
        raise UserError(f"--videos {folder} holds no .avi files")
    return clips


def unpack(archive, folder):
    """Extract a .rar with whichever program is installed; returns the folder. Raises UserError."""
    program = next((name for name in EXTRACTORS if shutil.which(name)), None)
    if program is None:
        raise UserError(f"to unpack {archive}, install one of {', '.join(EXTRACTORS)}, or unpack it yourself")
    done = folder / ".complete"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    words = [word.format(archive=archive, folder=folder) for word in EXTRACTORS[program]]
    result = subprocess.run([program, *words], capture_output=True, text=True)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise UserError(f"{program} cannot unpack {archive}: {lines[-1] if lines else 'no reason given'}")
    done.touch()
    return folder


def read_lists(source, split):
    """{"train": [(class, file name), ...], "test": ...} of a split. Raises UserError.

    source: the official folder or zip of lists.
    """
    lists = {}
    for part in ("train", "test"):
        name = f"{part}list{split:02d}.txt"
        try:
            if source.is_dir():
                text = next(source.rglob(name)).read_text(encoding="utf-8")
            else:
                with zipfile.ZipFile(source) as archive:
                    member = next(member for member in archive.namelist() if Path(member).name == name)
                    text = archive.read(member).decode("utf-8")
        except StopIteration:
            raise UserError(f"--lists {source} holds no {name}") from None
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"--lists {source} is neither a folder nor a zip of the split lists: {error}") from None
        entries = [line.split()[0] for line in text.splitlines() if line.strip()]
        lists[part] = [tuple(entry.split("/")[-2:]) for entry in entries]
        if not lists[part] or any(len(entry) != 2 for entry in lists[part]):
            raise UserError(f"{name} of --lists {source} is not lines of <class>/<clip>.avi")
    return lists


def place(source, target, copy):
    """Make target a copy of source, or a relative link to it. Returns whether there was anything to do."""
    if target.exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # a link whose clip has moved
    if copy:
        partial = target.with_suffix(".partial")
        shutil.copyfile(source, partial)
        os.replace(partial, target)
    else:
        target.symlink_to(os.path.relpath(source.resolve(), target.parent.resolve()))
    return True


def main():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path, required=True, help="UCF101.rar, or the folder it unpacks to")
    parser.add_argument("--lists", type=Path, required=True, help="zip or folder of the official split lists")
    parser.add_argument("--out", type=Path, default=HERE / "ucf-101", help="where train/ and test/ go")
    parser.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help="which of the official splits")
    parser.add_argument("--copy", action=argparse.BooleanOptionalAction, default=False, help="copy instead of linking")
    parser.add_argument("--allow-missing", action="store_true", help="go on without clips that are not there")
    args = parser.parse_args()

    lists = read_lists(args.lists, args.split)
    if not args.videos.exists():
        raise UserError(f"--videos {args.videos} does not exist")
    folder = args.videos if args.videos.is_dir() else unpack(args.videos, args.out / "unpacked")
    clips = find_clips(folder)
    missing = [name for part in lists.values() for _, name in part if name.lower() not in clips]
    if missing and not args.allow_missing:
        raise UserError(
            f"{len(missing)} clips of the lists are not in {folder}, {missing[0]} for one; --allow-missing goes on"
        )
    try:
        for part, entries in lists.items():
            present = [(label, name) for label, name in entries if name.lower() in clips]
            new = sum(
                place(clips[name.lower()], args.out / part / label / clips[name.lower()].name, args.copy)
                for label, name in present
            )
            classes = len({label for label, _ in present})
            print(f"{args.out / part}: {len(present)} clips of {classes} classes, {new} of them new")
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error}") from None


if __name__ == "__main__":
    cli.run(main)
