# `make demo` and `make test` are all a fresh machine needs: Python 3.10+ and make.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
DEMO := results/demo

.PHONY: demo test

$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Encodes the embedded clips, trains on their latents in BF16, samples in BF16 and scores the samples. The 16 bits are
# there to show that they work: at this size, on a CPU, they are no faster than FP32.
# A network this small gains little from a second core, and loses much if something else wants it.
demo: export OMP_NUM_THREADS = 1
demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(PY) datasets/make_demo_set.py --seed 1 --clips-per-class 8 --out $(DEMO)/held-out
	$(PY) EqM/extract_latents.py --data-path datasets/demo --vae datasets/demo-vae --image-size 32 --no-flip \
	    --video --clip-len 4 --use-bf16 --num-workers 1 --out $(DEMO)/latents
	$(PY) EqM/train.py --config configs/demo.toml --latents $(DEMO)/latents --val-path $(DEMO)/held-out \
	    --results-dir $(DEMO)
	$(PY) EqM/sample_gd.py --ckpt $(DEMO)/000-EqM-T-2-Linear-velocity-None/checkpoints/0004000.pt --use-bf16 \
	    --num-sampling-steps 50 --stepsize 0.008 --cfg-scale 2 --cfg-channels 4 --num-fid-samples 64 \
	    --global-batch-size 64 --classes 0 1 2 3 4 5 6 7 --folder $(DEMO)/samples
	$(PY) datasets/score_demo.py $(DEMO)/samples --vae datasets/demo-vae
	@grep -ho "(step=.*) Val Loss: [0-9.]*" $(DEMO)/000-*/log.txt | tail -1
	@echo "The picture: $(DEMO)/samples/grid.png"
	@command -v xdg-open >/dev/null && [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] && xdg-open $(DEMO)/samples/grid.png || true

test: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) -m pytest -q -n 2 --dist loadgroup
