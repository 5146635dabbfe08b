"""Make one file of a checkpoint that `train.py --split-checkpoints` wrote in parts.

    python -m EqM.gather --ckpt results/000-EqM-XL-2-Linear-velocity-None/checkpoints/0000100.pt --out model.pt

It holds what the run would have saved without that flag. This process needs memory for all of it.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:  # run by its path: import the package beside this file, whatever else is installed
    sys.path = [str(HERE.parent), *(folder for folder in sys.path if Path(folder).resolve() != HERE)]
if __name__ == "__main__":
    from EqM.run import stops

    stops.end_at_once()  # until main handles them: what follows takes seconds to import

from EqM import cli
from EqM.run import checkpoint, parts
from EqM.run.errors import UserError


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, help="folder of the checkpoint")
    parser.add_argument("--out", required=True, help="file to write")
    return parser.parse_args()


def main():
    args = parse_args()
    if not parts.is_in_parts(args.ckpt):
        raise UserError(f"--ckpt {args.ckpt} is no checkpoint in parts; one that is a file is whole already")
    if Path(args.out).exists():
        raise UserError(f"--out {args.out} is there already; give another name")
    checkpoint.save(args.out, checkpoint.read(args.ckpt))
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
