# make demo       pretrain on synthetic shapes, evaluate, draw figures, write a page, all in runs/demo (CPU, 8 minutes)
# make test       the whole test suite
# make playground a trained I-JEPA in the browser; MODEL=runs/mine for a run of yours (needs npm)
# make test-gpu   what only a CUDA GPU can show (a minute or two on one)
# make notebooks  run both notebooks from top to bottom and keep their outputs (minutes)
# make student    copies of both notebooks without solutions, in student/
# make slides     both notebooks as slides, in slides/ (reveal.js, from the network when shown)
# make colab      write the repository's address, below, into README and notebooks, with badges
# make lint       style checks
# make results    the runs behind the tables of shapes and volumes, three seeds each (an hour)
# make dial       when do representations beat pixels? three methods, three seeds (hours on a CPU; resumes)
# make ablations  the paper's ablations at our scale, three seeds (hours on a CPU; likewise)
# make collapse   what each safeguard against collapse is worth (minutes)
# make bugs       ten planted bugs, each trained for a short time (an hour; resumes)
# make streaming  what a folder too large for memory costs: images/s, memory (minutes)
# make torture    kills runs at random moments and injects faults (a quarter of an hour)
# Each makes its own environment in .venv; a machine needs only make and Python 3.10 or newer.

# The public address of this repository, such as https://github.com/OWNER/NAME; not known yet.
REPOSITORY :=
PYTHON ?= python3
RUN := .venv/bin/python
# What the playground shows: a run folder, or the name of one that ships; and where it is served.
MODEL ?= cifar10-ijepa
PORT ?= 8000
# Threads wait asleep, not spinning: as fast on an idle machine, many times faster on a busy one.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test test-gpu playground notebooks student slides colab results streaming torture \
	collapse bugs dial ablations lint clean

.venv/ready: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, but $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt -c constraints.txt
	@touch $@

.venv/tested: .venv/ready requirements-test.txt
	$(RUN) -m pip install --quiet -r requirements-test.txt -c constraints.txt
	@touch $@

demo: .venv/ready
	@rm -rf runs/demo
	OMP_NUM_THREADS=1 $(RUN) train.py --out runs/demo  # so small a model gains next to nothing from a second
	$(RUN) evaluate.py runs/demo
	$(RUN) -m extras.probes runs/demo --few-labels
	$(RUN) -m extras.figures runs/demo
	$(RUN) -m extras.report runs/demo
	@echo; echo "All of it is in runs/demo. Open runs/demo/report.html in a browser: one page with what was trained and measured, and the figures."

test: .venv/tested
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests -n auto --maxprocesses 4 --dist loadfile

.venv/playground: .venv/ready requirements-playground.txt
	$(RUN) -m pip install --quiet -r requirements-playground.txt -c constraints.txt
	@touch $@

playground/node_modules: playground/package-lock.json
	npm ci --prefix playground --ignore-scripts --no-audit --no-fund
	@touch $@

playground: .venv/playground playground/node_modules
	$(RUN) -m extras.playground $(MODEL)
	@echo "Open http://localhost:$(PORT) (Ctrl-C ends it)"
	@$(RUN) -m http.server $(PORT) --bind localhost --directory playground

test-gpu: .venv/tested
	$(RUN) -m pytest tests/test_gpu.py -v -rs

notebooks: .venv/ready
	$(RUN) bench/run_notebooks.py

student: .venv/ready
	$(RUN) -m tests.student

slides: .venv/ready
	$(RUN) bench/slides.py

colab: .venv/ready
	$(RUN) bench/colab.py "$(REPOSITORY)"

results: .venv/ready
	for run in shapes-0 shapes-1 shapes-2 shapes3d-0 shapes3d-1 shapes3d-2; do \
		preset=$${run%-*}; seed=$${run#*-}; rm -rf runs/$$run; \
		$(RUN) train.py --preset $$preset --seed $$seed --out runs/$$run && $(RUN) evaluate.py runs/$$run && $(RUN) -m extras.probes runs/$$run && \
		cp runs/$$run/evaluation.json results/$${preset}_seed$$seed.json && \
		cp runs/$$run/metrics.csv results/$${preset}_seed$${seed}_metrics.csv || exit 1; \
	done

streaming: .venv/ready
	$(RUN) bench/streaming.py --files 20000 > streaming.tmp && mv streaming.tmp results/streaming.json

torture: .venv/tested
	$(RUN) bench/torture.py

collapse: .venv/ready
	$(RUN) bench/collapse.py > collapse.tmp && mv collapse.tmp results/collapse.json

bugs: .venv/ready
	OMP_NUM_THREADS=1 $(RUN) -m extras.bugs

dial: .venv/ready
	$(RUN) -m extras.experiments dial --seeds 0 1 2

ablations: .venv/ready
	$(RUN) -m extras.experiments ablations --seeds 0 1 2 --jobs 2 --measurements 2

lint: .venv/ready
	$(RUN) -m pip install --quiet ruff==0.17.5
	$(RUN) -m ruff check .

clean:
	rm -rf .venv runs playground/node_modules playground/built
