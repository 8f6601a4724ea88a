"""See nemo_ssopd/convert/launch.py, or call it with --help."""

from nemo_ssopd.convert.launch import import_main

if __name__ == "__main__":
    import_main()
