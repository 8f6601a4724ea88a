"""See nemo_ssopd/conversion.py, or call it with --help."""

from nemo_ssopd.conversion import export_main

if __name__ == "__main__":
    export_main()
