"""Demonstrations: record now, decrypt later, and two sites. Only the commands import this
package."""
