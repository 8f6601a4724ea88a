"""Export a checkpoint to Hugging Face format: see nemo_ssopd/convert/launch.py, or run with --help."""

from nemo_ssopd.convert.launch import export_main

if __name__ == "__main__":
    export_main()
