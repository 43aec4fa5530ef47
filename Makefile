# Every target makes its own environment (.venv, from requirements.lock) on first use. Needs Python 3.10-3.13, git, make.
PYTHON ?= python3
LABS := .venv/bin/python -m labs_lib
LABS_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help env lab test course book lock clean

help:
	@echo "make lab      open the course in JupyterLab      (LABS_ARGS=--no-browser, LABS_ARGS='--port 9000')"
	@echo "make test     lint, unit tests, every notebook   (LABS_ARGS='--only unit')"
	@echo "make course   run all labs, write a report to browse"
	@echo "make book     write the course as a site to read    (LABS_ARGS=--student)"
	@echo "make env      only make the environment, .venv"
	@echo "make lock     update requirements.lock from pyproject.toml   (LABS_ARGS=--upgrade)"
	@echo "make clean    remove .venv, .cache and build (what your runs left); notebooks and data stay"
	@echo "More commands: .venv/bin/labs --help. Another Python: make PYTHON=/path/to/python3.12 lab"

env:
	@"$(PYTHON)" -I labs_lib/bootstrap.py

lab test course book lock: env
	@$(LABS) $@ $(LABS_ARGS)

clean:
	@"$(PYTHON)" -I labs_lib/bootstrap.py --clean
