"""Parts that tools are made of; they import no tool."""
