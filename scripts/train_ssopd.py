"""Train: python scripts/train_ssopd.py --config-name NAME [KEY=VALUE ...], also under torchrun and srun."""

from nemo_ssopd.run.launch import main

if __name__ == "__main__":
    main()
