"""See nemo_ssopd/conversion.py, or call it with --help."""

from nemo_ssopd.conversion import import_main

if __name__ == "__main__":
    import_main()
