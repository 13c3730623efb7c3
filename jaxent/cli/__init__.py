"""`jaxent train | evaluate | tokens`: a language model on real text, with the library's own loss."""

from jaxent.cli.main import main as main
