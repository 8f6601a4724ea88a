"""Evaluate: python scripts/evaluate.py --config-name NAME model=PATH [KEY=VALUE ...], also under torchrun and srun."""

from nemo_ssopd.evaluation.launch import main

if __name__ == "__main__":
    main()
