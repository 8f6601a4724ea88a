"""Import a Hugging Face model as a checkpoint: see nemo_ssopd/convert/launch.py, or run with --help."""

from nemo_ssopd.convert.launch import import_main

if __name__ == "__main__":
    import_main()
