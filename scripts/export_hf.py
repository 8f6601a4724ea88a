"""See nemo_ssopd/convert/launch.py, or call it with --help."""

from nemo_ssopd.convert.launch import export_main

if __name__ == "__main__":
    export_main()
